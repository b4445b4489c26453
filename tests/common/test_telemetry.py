"""Which GPUs a process may use, by the rules that CUDA has for CUDA_VISIBLE_DEVICES."""

from __future__ import annotations

import pytest

from common import telemetry


@pytest.mark.parametrize(
    ("value", "names"),
    [
        (None, ["0", "1"]),
        ("1", ["1"]),
        ("1, 0", ["1", "0"]),
        ("GPU-8a, MIG-3f", ["GPU-8a", "MIG-3f"]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("0,-1,1", ["0"]),
    ],
)
def test_the_first_entry_that_names_no_gpu_ends_the_list(
    monkeypatch: pytest.MonkeyPatch, value: str | None, names: list[str]
) -> None:
    monkeypatch.setattr(telemetry, "_nvml", lambda: True)
    monkeypatch.setattr(telemetry, "gpu_count", lambda: 2)
    if value is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert telemetry.visible_gpus() == names
