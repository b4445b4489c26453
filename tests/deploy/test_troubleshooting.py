"""docs/troubleshooting.md quotes messages that exist: ours in our source, the engine's in the installed release."""

from __future__ import annotations

import functools
import importlib.util
import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from common.recipe import Recipe

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = REPOSITORY / "docs" / "troubleshooting.md"
OURS = ("actors", "broker", "common", "deploy", "learner")
THEIRS = {
    "less than desired GPU memory utilization": "vllm/v1/worker/utils.py",
    "No available memory for the cache blocks": "vllm/v1/core/kv_cache_utils.py",
    "To serve at least one request with the model's max seq len": "vllm/v1/core/kv_cache_utils.py",
    "must be divisible by tensor parallel size": "vllm/config/model.py",
    "Bfloat16 is only supported on GPUs": "vllm/platforms/cuda.py",
    " is not found in LD_PRELOAD": "vllm/v1/worker/cpu_worker.py",
    "CUDA_HOME does not exist": "deepspeed/ops/op_builder/builder.py",
}
# Messages of programs without a readable source here: CUDA, NCCL, gloo, safetensors, Slurm, systemd, the kernel.
COMPILED = {
    "SafetensorError: ",
    "CUDA out of memory",
    "NCCL WARN Bootstrap : no socket interface found",
    "ncclSystemError",
    "ncclUnhandledCudaError",
    "Watchdog caught collective operation timeout",
    "Connection closed by peer",
    "PD",
    "(Resources)",
    "(Priority)",
    "(BeginTime)",
    "DUE TO TIME LIMIT",
    "DUE TO PREEMPTION",
    "oom_kill",
    "Watchdog timeout",
    "status=2/INVALIDARGUMENT",
    "Read-only file system",
}


def messages() -> list[str]:
    """What the first columns quote, up to where the text leaves something out."""
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    quoted = [quote for row in rows for quote in re.findall(r"`([^`]+)`", row.split(" | ")[0])]
    return list(dict.fromkeys(max(quote.split("..."), key=len) for quote in quoted))


@functools.cache
def source() -> str:
    """All of our source, with string literals that stand below one another joined; batch files and units too."""
    kinds = ("*.py", "*.jinja")
    files = [
        path for package in OURS for kind in kinds for path in sorted((REPOSITORY / package).rglob(kind))
    ]
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    return re.sub(r'"\s*\n\s*f?"', "", text)


def test_the_page_quotes() -> None:
    assert len(messages()) > 50


@pytest.mark.parametrize("message", messages())
def test_message_exists(message: str) -> None:
    if message in THEIRS:
        package, _, file = THEIRS[message].partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            pytest.skip(f"{package} is not installed")
        assert message in re.sub(r'"\s*\n\s*f?"', "", (Path(spec.origin).parent / file).read_text())
    elif message not in COMPILED:
        message = message.removeprefix("sbatch")  # one text for each of Slurm's commands
        plain = re.sub(r"\{[^{}]*\}", "", source())
        assert message.strip() in source() or message.strip() in plain


def test_settings_exist() -> None:
    fields = {f"{section}.{name}" for section, model in sections().items() for name in model.model_fields}
    named = re.findall(r"`([a-z_]+\.[a-z_]+)(?:`| = )", PAGE.read_text(encoding="utf-8"))
    assert len(named) > 20
    assert {name for name in named if name.split(".")[0] in sections()} <= fields


def sections() -> dict[str, type[BaseModel]]:
    """Sections of a recipe by name."""
    kinds = {name: field.annotation for name, field in Recipe.model_fields.items()}
    return {
        name: kind for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, BaseModel)
    }


def test_linked_from_where_a_reader_starts() -> None:
    for page in ("docs/start.md", "docs/operating.md"):
        assert "troubleshooting.md" in (REPOSITORY / page).read_text(encoding="utf-8")
