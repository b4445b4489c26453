"""A worker that should use a GPU says so when its torch cannot."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from common import accelerator
from common.accelerator import require_gpu, require_gpu_build
from common.errors import UserError

CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints" / "gpu.txt"


def machine(monkeypatch: pytest.MonkeyPatch, gpus: list[str], cuda: str | None, usable: bool = False) -> None:
    """Pretend GPUs, a build of torch, and whether its CUDA works."""
    monkeypatch.setattr(accelerator, "visible_gpus", lambda: gpus)
    monkeypatch.setattr(accelerator, "_driver", lambda: "550.54.15")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: usable)


@pytest.mark.parametrize("check", [require_gpu, require_gpu_build])
@pytest.mark.parametrize(("device", "gpus"), [("auto", ["0"]), ("gpu", ["0"]), ("gpu", [])])
def test_a_cpu_build_is_refused_where_a_gpu_is_meant(monkeypatch, check, device, gpus) -> None:
    machine(monkeypatch, gpus, None)
    with pytest.raises(UserError, match=r"^launch\.device: .*CPU build: .*SLIPSTREAM_EXTRA=gpu make setup"):
        check(device)


@pytest.mark.parametrize(("device", "gpus"), [("cpu", ["0"]), ("auto", [])])
def test_a_cpu_build_is_right_where_none_is(monkeypatch, device, gpus) -> None:
    machine(monkeypatch, gpus, None)
    require_gpu(device)


def test_a_driver_too_old_is_named_with_the_one_needed(monkeypatch) -> None:
    machine(monkeypatch, ["0"], "13.0")
    require_gpu_build("auto")  # what the driver can do is vLLM's to say
    with pytest.raises(UserError, match=r"CUDA 13\.0 .* R580 or newer, and here is 550\.54\.15$"):
        require_gpu("auto")
    machine(monkeypatch, ["0"], "13.0", usable=True)
    require_gpu("auto")


def test_the_advice_names_the_driver_of_what_setup_installs() -> None:
    (major,) = re.findall(r"^cuda-python==(\d+)\.", CONSTRAINTS.read_text(), re.M)
    assert int(major) == accelerator.EXTRA_CUDA
