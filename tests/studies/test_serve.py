"""`slipstream serve`: the files are valid shell, and each node gets the words that vLLM's own parser accepts."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from common.errors import UserError
from deploy.serve import render, serve, serve_command

FAKE_VLLM = """#!/bin/bash
printf '%s\\n' "$@" > "$RECORD"
"""


def started(
    tmp_path: Path, nodes: int, *arguments: str, host: str | None = None, key: str | None = "secret"
) -> list[str]:
    """What serve.sh hands to vllm."""
    command = serve_command(
        "some one/big model",
        tensor_parallel=8 * nodes,
        precision="auto",
        max_context=4096,
        port=8000,
        trust_remote_code=False,
    )
    values = {
        "name": "m",
        "nodes": nodes,
        "gpus": 8,
        "port": 8000,
        "partition": "gpu",
        "time": "60",
        "host": host,
    }
    texts = render(**values, setup="export A=1", folder=str(tmp_path), command=shlex.join(command))
    script = tmp_path / "serve.sh"
    script.write_text(texts["serve.sh"])
    fake = tmp_path / "vllm"
    fake.write_text(FAKE_VLLM)
    fake.chmod(0o755)
    record = tmp_path / "record"
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RECORD": str(record)}
    environment |= {"VLLM_API_KEY": key} if key else {}
    subprocess.run(["bash", script, *arguments], env=environment, check=True)
    return record.read_text().splitlines()


def value(words: list[str], option: str) -> str:
    """The word after an option."""
    return words[words.index(option) + 1]


def test_first_node_answers_and_the_others_are_headless(tmp_path: Path) -> None:
    first, second = (started(tmp_path, 2, str(rank), "10.0.0.5") for rank in (0, 1))
    assert first[:2] == ["serve", "some one/big model"]
    assert value(first, "--tensor-parallel-size") == "16"
    assert [value(words, "--node-rank") for words in (first, second)] == ["0", "1"]
    assert {value(words, "--master-addr") for words in (first, second)} == {"10.0.0.5"}
    assert "--headless" not in first
    assert "--headless" in second


def test_one_node_needs_no_rendezvous(tmp_path: Path) -> None:
    words = started(tmp_path, 1)
    assert not {"--nnodes", "--master-addr", "--headless"} & set(words)


def test_it_listens_where_its_node_is_and_never_there_without_a_key(tmp_path: Path) -> None:
    assert value(started(tmp_path, 1, key=None), "--host") == "127.0.0.1"
    assert value(started(tmp_path, 1, "0", "10.0.0.5"), "--host") == "10.0.0.5"
    words = started(tmp_path, 1, "0", "10.0.0.5", host="0.0.0.0")
    assert (value(words, "--host"), "secret" in words) == ("0.0.0.0", False)
    for host in (None, "0.0.0.0"):
        with pytest.raises(subprocess.CalledProcessError):
            started(tmp_path, 1, "0", "10.0.0.5", host=host, key=None)


@pytest.mark.nightly  # vLLM takes 10 s to import
def test_vllm_knows_every_option(tmp_path: Path) -> None:
    vllm = pytest.importorskip("vllm.engine.arg_utils")
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    known = vllm.AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    options = {word for word in started(tmp_path, 2, "1", "10.0.0.5") if word.startswith("--")}
    served = {"--host", "--port", "--headless"}  # of the server, not of the engine
    assert options - served <= set(known._option_string_actions)


def test_a_rank_beyond_the_nodes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        started(tmp_path, 2, "2", "10.0.0.5")


def test_batch_file_is_shell_and_asks_for_the_nodes(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(serve)
    arguments = [
        "deepseek-ai/DeepSeek-V3-Base",
        "--nodes",
        "4",
        "--precision",
        "bf16",
        "--out",
        str(tmp_path),
    ]
    result = CliRunner().invoke(app, [*arguments, "--partition", "gpu", "--time", "1-00:00:00"])
    assert result.exit_code == 0, result.output
    batch = tmp_path / "serve.sbatch"
    subprocess.run(["bash", "-n", batch], check=True)
    lines = batch.read_text().splitlines()
    assert "#SBATCH --nodes=4" in lines
    assert "#SBATCH --gpus-per-node=8" in lines
    command = result.output.splitlines()[0]
    assert "--tensor-parallel-size 32" in command
    assert "--dtype bfloat16" in command


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"precision": "int3"}, "--precision"),
        ({"partition": "a b"}, "--partition"),
        ({"time": "soon"}, "--time"),
        ({"host": "here; there"}, "--host"),
        ({"out": "it's mine"}, "--out"),
    ],
)
def test_bad_input_names_the_option(tmp_path: Path, changes: dict, setting: str) -> None:
    arguments = {"model": "m", "out": None} | changes
    out = tmp_path / (arguments.pop("out") or "fine")
    with pytest.raises(UserError) as error:
        serve(**{"partition": None, "time": None, "setup": None, **arguments}, out=out)
    assert error.value.setting == setting
