"""Memory that `slipstream check` predicts against the peak of the real processes.

    python -m benchmarks.memory [--models base large ...] [--set KEY=VALUE ...] [--json FILE]

Runs the launcher (`slipstream run`: broker, learner, actor, all real) for a few steps on each model and samples
the learner's processes and the actor's processes (front, engine, verifier). A sample is the memory that only
these processes can give back: anonymous and shared-memory pages, each shared page divided among those who share
it (Pss of /proc/PID/smaps_rollup), so that a forked engine is not counted twice. The reference of the same run is
a process that imports the same libraries and does nothing. Compared are peak − reference and predicted −
reference; the aim is 15 %.

`base` is models/minimath-base; `large` and `wide` are built on the spot with random weights (24 M parameters; a
vocabulary of 32,768).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from benchmarks.whole_run import run_command
from common.model_files import read_shape
from common.recipe import load_recipe
from deploy.memory import MIB, MemoryPlan, actor_memory, learner_memory

REPOSITORY = Path(__file__).resolve().parents[1]
BASE = REPOSITORY / "models" / "minimath-base"
PERIOD_S = 0.25
# hidden, intermediate, layers, heads, key heads, vocabulary
SIZES = {"large": (512, 2048, 6, 8, 4, 512), "wide": (256, 768, 3, 8, 4, 32768)}
IMPORTS = {
    "learner": "import learner.main, transformers; from learner.ranks import load_deepspeed; load_deepspeed(); "
    "from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM",
    "actor": "import actors.main; from vllm import AsyncEngineArgs; from actors.executors import OwnedLLM",
}
SETTINGS = (
    "run.steps=3",
    "batch.questions_per_step=16",
    "batch.zero_variance='train'",  # random weights earn nothing: without this nothing would be trained
    "learner.micro_batch_tokens=1024",
    "learner.logprob_chunk_tokens=512",
    "eval.sets=[]",
    "tracking.enabled=false",
)


class Peak(NamedTuple):
    """MiB: peak of the processes, and of the bare import beside it."""

    process: str
    measured: float
    reference: float


def main() -> int:
    """Measure each model, print a table, return 1 when a prediction misses by more than 15 %."""
    options = _options()
    references = {name: reference(code) for name, code in IMPORTS.items()}
    rows = [row for model in options.models for row in _rows(model, options.set, references)]
    print(
        "| model | process | bare import | peak beyond it | predicted | error | aim |\n|---|---|---|---|---|---|---|"
    )
    for row in rows:
        print(
            f"| {row['model']} | {row['process']} | {row['reference']:.0f} | {row['measured']:.0f} | "
            f"{row['predicted']:.0f} MiB | {row['error']:+.1%} | ±15 % |"
        )
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1))
    return int(any(abs(row["error"]) > 0.15 for row in rows))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["base", "large", "wide"], help="base, large, wide")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="recipe overrides")
    parser.add_argument("--json", help="also write the rows to this file")
    return parser.parse_args()


def _rows(model: str, overrides: Sequence[str], references: Mapping[str, float]) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as root:
        path = BASE if model == "base" else build_model(Path(root) / "model", *SIZES[model])
        settings = [*SETTINGS, f"model.path='{path}'", f"run.root='{root}'", *overrides]
        recipe = load_recipe("demo", settings)
        peaks = measure(settings)
        shape = read_shape(str(path))
    plans = {"learner": learner_memory(recipe, shape, "cpu"), "actor": actor_memory(recipe, shape, "cpu")}
    return [_row(model, name, peaks[name], references[name], plan) for name, plan in plans.items()]


def _row(model: str, name: str, peak: float, reference: float, plan: MemoryPlan) -> dict[str, Any]:
    measured = peak - reference
    predicted = plan.beyond_import / MIB
    return {
        "model": model,
        "process": name,
        "reference": reference,
        "measured": measured,
        "predicted": predicted,
        "error": predicted / measured - 1,
        "terms": {term: size / MIB for term, size in plan.terms.items()},
    }


def build_model(
    folder: Path, hidden: int, intermediate: int, layers: int, heads: int, key_heads: int, vocabulary: int
) -> Path:
    """A Qwen2 with random weights and the tokenizer of minimath-base; returns its folder."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config.from_pretrained(
        BASE,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        vocab_size=vocabulary,
        layer_types=["full_attention"] * layers,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(folder)
    return folder


def measure(settings: Sequence[str]) -> dict[str, float]:
    """Peaks of the learner's and the actor's processes in MiB, over one run of the demo with these settings.

    Processes are read one after another: a fork in between counts its pages twice. A peak is what two samples in a row
    have seen.
    """
    launcher = subprocess.Popen(run_command("demo", settings), stdout=sys.stderr, cwd=REPOSITORY)
    peaks, before = {"learner": 0.0, "actor": 0.0}, {"learner": 0.0, "actor": 0.0}
    while launcher.poll() is None:
        for name in peaks:
            now = sum(map(held, _family(launcher.pid, name)))
            peaks[name], before[name] = max(peaks[name], min(now, before[name])), now
        time.sleep(PERIOD_S)
    if launcher.returncode:
        raise SystemExit(f"the run failed with exit code {launcher.returncode}")
    return peaks


def _family(launcher: int, verb: str) -> list[int]:
    """Processes of the worker that was started with `verb`."""
    try:
        workers = [p for p in psutil.Process(launcher).children() if verb in p.cmdline()[:5]]
        return [p.pid for worker in workers for p in (worker, *worker.children(recursive=True))]
    except psutil.Error:
        return []


def held(pid: int) -> float:
    """MiB of a process that are neither files nor other processes' share; 0 for one that has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return 0.0
    sizes = {name: int(size.split()[0]) for name, size in (line.split(":") for line in lines)}
    return (sizes["Pss_Anon"] + sizes["Pss_Shmem"]) / 1024


def reference(code: str) -> float:
    """MiB of a process that has run these imports."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    process = subprocess.Popen(
        [sys.executable, "-c", f"{code}\nprint('ready', flush=True)\ninput()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=REPOSITORY,
        env=environment,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    if "ready" not in process.stdout.read(6):
        raise SystemExit("the libraries could not be imported")
    found = held(process.pid)
    process.communicate("\n")
    return found


if __name__ == "__main__":
    sys.exit(main())
