"""Snapshots: every ZeRO stage, both dtypes, tied weights, adapters; and what they cost in memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from tiny import tiny_lm

from common.errors import UserError
from common.weights import Snapshot
from learner.snapshot import take_snapshot

RANK_PROGRAM = Path(__file__).with_name("snapshot_rank.py")


def adapted(seed: int = 0):
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(tiny_lm(seed), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at the start: an adapter that does nothing would prove nothing
                parameter.normal_(std=0.1)
    return model


@pytest.mark.parametrize("tied", [True, False])
def test_names_are_those_of_the_checkpoint_and_tied_weights_come_once(tied):
    model = tiny_lm(tied=tied)
    snapshot = take_snapshot(model, bucket_bytes=4096)
    tensors = dict(snapshot.tensors())
    assert ("lm_head.weight" in tensors) is not tied
    assert tensors.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(tensors[name], p) for name, p in model.named_parameters())


def test_pinned_buckets_share_one_block():
    model = tiny_lm()
    plain, pinned = (take_snapshot(model, bucket_bytes=4096, pinned=way) for way in (False, True))
    assert len(pinned.layout) > 2
    assert len({pinned.buffer(bucket.index).untyped_storage().data_ptr() for bucket in pinned.layout}) == 1
    for snapshot in (plain, pinned):
        snapshot.stamp(3)
    for bucket in plain.layout:
        assert torch.equal(plain.buffer(bucket.index), pinned.buffer(bucket.index))


def test_floats_are_converted_on_the_way():
    model = tiny_lm()
    snapshot = take_snapshot(model, dtype=torch.bfloat16)
    for name, tensor in snapshot.tensors():
        assert torch.equal(tensor, model.get_parameter(name).to(torch.bfloat16))


def test_the_value_head_and_the_wrapper_are_left_out():
    wrapper = torch.nn.Module()
    wrapper.lm, wrapper.value_head = tiny_lm(), torch.nn.Linear(32, 1)
    assert all(not n.startswith(("lm.", "value_head")) for n, _ in take_snapshot(wrapper).tensors())


def test_adapters_are_merged_as_peft_merges_them():
    model = adapted()
    before = {name: p.clone() for name, p in model.named_parameters()}
    tensors = dict(take_snapshot(model, bucket_bytes=4096).tensors())
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters()), "the model was changed"
    merged = dict(model.merge_and_unload().named_parameters())
    assert tensors.keys() == merged.keys()
    assert all(torch.allclose(tensors[name], p, atol=1e-6) for name, p in merged.items())


def test_an_adapter_alone_has_the_names_that_peft_saves(tmp_path):
    from safetensors.torch import load_file

    model = adapted()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    snapshot = take_snapshot(model, adapters_only=True)
    tensors = dict(snapshot.tensors())
    assert tensors.keys() == saved.keys()
    assert all(torch.equal(tensors[name], saved[name]) for name in saved)
    assert snapshot.manifest.kind == "adapter"
    assert snapshot.manifest.meta["adapter_config"]["r"] == 4


def test_injected_adapters_are_found_too():
    """The learner injects adapters without peft's wrapper."""
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = inject_adapter_in_model(config, tiny_lm())
    names = {name for name, _ in take_snapshot(model).tensors()}
    assert names == dict(tiny_lm().named_parameters()).keys()
    assert len(list(take_snapshot(model, adapters_only=True).tensors())) == 4


def test_pushing_adapters_of_a_policy_without_any_is_refused():
    with pytest.raises(UserError, match=r"lora\.push"):
        take_snapshot(tiny_lm(), adapters_only=True)


def test_a_released_snapshot_gives_nothing():
    from common.weights import SupersededError

    snapshot = Snapshot.from_tensors([("w", torch.ones(3))])
    snapshot.stamp(7)
    snapshot.release()
    with pytest.raises(SupersededError, match="version 7"):
        snapshot.buffer(0)


def run_ranks(mode: str) -> None:
    """Two ranks, all stages in one pair of processes: starting them is what costs."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{Path.cwd()}:{RANK_PROGRAM.parent}"}
    done = subprocess.run(
        [*command, str(RANK_PROGRAM), mode], env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.e2e
def test_every_zero_stage_gives_the_weights_on_rank_0():
    run_ranks("equal")


@pytest.mark.e2e
@pytest.mark.nightly
def test_peak_memory_is_one_snapshot_and_one_bucket():
    run_ranks("memory")
