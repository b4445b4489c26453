"""Checkpoints: written whole or not at all, found again for sure.

Invariant: a folder named `step-N` is complete, because it gets its name last, after its files are on the disk;
whatever a crash or a full disk leaves behind has another name and is never chosen. A checkpoint that might still be
wanted (ahead of the ledger, or damaged) is renamed, never deleted, until a later one is safe. The pointer
`latest.json` is replaced atomically after it, for people and tools. The checkpoint of step N is the state *before*
step N: N steps are done, the policy is version N.

    checkpoints/
        latest.json             {"step": N, "folder": "step-00000N"}
        step-00000N/            DeepSpeed's shards, one set per rank
            hf/                 model and tokenizer in Hugging Face format, for vLLM, transformers or `eval`

A resumed run continues bit for bit: weights, optimizer, schedule and random generators of all ranks. The order
of the responses within a step is a function of seed and step (`learner.batch`) and needs no saving.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.errors import RunFailedError, UserError
from common.files import replace_json, to_disk
from common.recipe.schema import Recipe
from common.run_files import EXPORT_FOLDER
from common.tracking.tables import flatten
from learner.durable import cut_short, damage_of
from learner.engine import Engine
from learner.model import bytes_of_checkpoint
from learner.ranks import Ranks

log = logging.getLogger("slipstream.learner")

POINTER = "latest.json"
REMAINS = (".partial-*", ".deleted-*")  # of a crash
AHEAD, DAMAGED = ".ahead-", ".damaged-"  # of what was set aside
# A change of these makes the saved state another model's or another layout's.
BOUND_SETTINGS = (
    "model.path",
    "model.dtype",
    "lora",
    "algorithm.preset",
    "algorithm.advantage",
    "learner.zero_stage",
    "learner.ranks",
)


class Saved(NamedTuple):
    """A complete checkpoint on disk."""

    step: int
    folder: Path


class Checkpoints:
    """The checkpoints of a run; `save` and `load` are collective over the ranks.

    Args:
        folder: `checkpoints` in the run folder; on storage that all ranks share.
        recipe: kept with each checkpoint and compared on resume.

    Attributes:
        failures: checkpoints that could not be written since the last that could.
    """

    def __init__(self, folder: Path, recipe: Recipe, ranks: Ranks) -> None:
        self.folder = folder
        self.failures = 0
        self._recipe = recipe
        self._ranks = ranks

    def complete(self) -> list[Saved]:
        """All complete checkpoints, oldest first."""
        found = (Saved(_step_of(path), path) for path in self.folder.glob("step-*") if path.is_dir())
        return sorted(saved for saved in found if saved.step >= 0)

    def to_resume(self, at_most: int) -> Saved | None:
        """The checkpoint to go on from: the newest that is not ahead of step `at_most` and is whole.

        One whose files were cut short is set aside. None where there is no checkpoint at all.

        Raises:
            UserError: there are checkpoints, or were set aside, and none to go on from; nothing was deleted.
            OSError: one cannot be read, and may be whole.
        """
        found = self.complete()
        for saved in reversed(found):
            if saved.step > at_most:
                continue
            if (damage := cut_short(saved.folder)) is None:
                return saved
            self._set_aside(saved, DAMAGED, damage)
        if found or self._aside(AHEAD) or self._aside(DAMAGED):
            raise UserError(
                f"no checkpoint in {self.folder} can be continued: those up to step {at_most}, where the broker "
                f"stands, are damaged or missing. Rename a {DAMAGED}N that is whole after all to step-N, or start "
                "the run anew with --fresh.",
                setting="run.name",
            )
        return None

    def discard_after(self, step: int) -> None:
        """Set aside checkpoints of a history that a rewind to `step` has ended, and remove what a crash left."""
        if not self._ranks.leads:
            return
        self._remove(REMAINS)
        for saved in self.complete():
            if saved.step > step:
                self._set_aside(saved, AHEAD, f"the run goes on from step {step}")

    def _aside(self, why: str) -> list[Saved]:
        """What was set aside, without an order."""
        return [
            Saved(int(number), path)
            for path in self.folder.glob(f"{why}*")
            if (number := path.name.removeprefix(why)).isdigit()
        ]

    def _set_aside(self, saved: Saved, why: str, reason: str) -> None:
        aside = saved.folder.with_name(f"{why}{saved.step:06d}")
        shutil.rmtree(aside, ignore_errors=True)
        saved.folder.rename(aside)
        log.warning("checkpoint %s is set aside as %s: %s", saved.folder.name, aside.name, reason)

    def _remove(self, patterns: Iterable[str]) -> None:
        for pattern in patterns:
            for path in self.folder.glob(pattern):
                shutil.rmtree(path, ignore_errors=True)

    # --- saving -----------------------------------------------------------------------------------------

    def save(self, engine: Engine, step: int, export: Callable[[Path], None]) -> Saved | None:
        """Save the state before `step`.

        Args:
            export: collective; writes the Hugging Face-format model into the folder it is given.

        Returns:
            The checkpoint; None when the disk is full: the one before stays, and training can go on.
        """
        target = self.folder / _folder_name(step)
        partial = self.folder / f".partial-{step:06d}"
        if not self._has_room(engine):
            self._give_up(partial, f"less than {bytes_of_checkpoint(engine.policy) >> 20} MiB free")
            return None
        try:
            self._write(engine, step, partial, export)
            if self._ranks.leads:
                self._complete(step, partial, target)
        except Exception as error:  # safetensors, for one, has an error of its own for a full disk
            if self._ranks.world > 1:
                raise  # the ranks are out of step: the launcher restarts them from the last checkpoint
            log.debug("writing a checkpoint failed", exc_info=True)
            self._give_up(partial, f"{type(error).__name__}: {error}")
            return None
        self._ranks.barrier()
        self.failures = 0
        return Saved(step, target)

    def _complete(self, step: int, partial: Path, target: Path) -> None:
        """Give a written checkpoint its name, once its files are on the disk."""
        to_disk(partial)
        self._delete(Saved(step, target))
        partial.rename(target)
        to_disk(self.folder)
        try:
            replace_json(self.folder / POINTER, {"step": step, "folder": target.name}, durable=True)
        except OSError as error:
            log.warning("%s still names an earlier checkpoint: %s", self.folder / POINTER, error)

    def _has_room(self, engine: Engine) -> bool:
        if self._ranks.leads:
            self.folder.mkdir(parents=True, exist_ok=True)
        lacking = self._ranks.leads and free_bytes(self.folder) < bytes_of_checkpoint(engine.policy)
        return not self._ranks.any(lacking)

    def _write(self, engine: Engine, step: int, partial: Path, export: Callable[[Path], None]) -> None:
        if self._ranks.leads:
            shutil.rmtree(partial, ignore_errors=True)
        self._ranks.barrier()
        state = {
            "step": step,
            "version": step,
            "recipe": self._recipe.model_dump(mode="json"),
            "generators": self._ranks.gather(_generator_state(self._ranks)),
        }
        engine.deepspeed.save_checkpoint(
            str(self.folder), tag=partial.name, client_state=state, save_latest=False
        )
        export(partial / EXPORT_FOLDER)
        self._own_files_to_disk(partial)
        self._ranks.barrier()

    def _own_files_to_disk(self, partial: Path) -> None:
        """Each rank its own: only the host that wrote a file can, and none shall wait for rank 0 to do it for all."""
        for path in partial.rglob("*") if self._ranks.leads else partial.glob("*"):
            if _writer_of(path) == self._ranks.rank:
                to_disk(path)

    def _give_up(self, partial: Path, reason: str) -> None:
        self.failures += 1
        if self._ranks.leads:
            shutil.rmtree(partial, ignore_errors=True)
            log.warning("no checkpoint was written to %s (%s): the one before stays", self.folder, reason)

    # --- loading ----------------------------------------------------------------------------------------

    def load(self, engine: Engine, step: int) -> int:
        """Restore everything from the checkpoint of `step` into a fresh engine; returns the step to go on with.

        Raises:
            UserError: the recipe has changed in a setting that the saved state is bound to.
            RunFailedError: DeepSpeed does not find its files.
            Exception: it cannot read them. Where they are damaged, they are set aside first: the restarted learner
                goes on from the checkpoint before.
        """
        try:
            path, state = engine.deepspeed.load_checkpoint(str(self.folder), tag=_folder_name(step))
        except Exception:
            saved = Saved(step, self.folder / _folder_name(step))
            if (damage := damage_of(saved.folder)) is not None:  # on any rank: each reads its own shard
                with suppress(FileNotFoundError):  # another rank was first
                    self._set_aside(saved, DAMAGED, damage)
            raise
        if path is None:
            raise RunFailedError(f"the learner cannot load {self.folder / _folder_name(step)}")
        self._compare(state["recipe"])
        _restore_generators(state["generators"], self._ranks)
        return state["step"]

    def _compare(self, saved: Mapping[str, Any]) -> None:
        before, now = flatten(saved), flatten(self._recipe.model_dump(mode="json"))
        changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
        for name in changed:
            if any(name == bound or name.startswith(f"{bound}.") for bound in BOUND_SETTINGS):
                raise UserError(
                    f"the checkpoint was written with {before.get(name)!r}; a resumed run cannot change it.",
                    setting=name,
                )
        if changed and self._ranks.leads:
            log.info("settings changed since the checkpoint: %s", ", ".join(changed))

    # --- keeping ----------------------------------------------------------------------------------------

    def prune(self, accuracy: Mapping[int, float]) -> None:
        """Delete all but the last n and the best, and what was set aside.

        A checkpoint called damaged may be whole after all (a disk that failed for a while): it stays until one of
        its step or later is safe.

        Args:
            accuracy: held-out accuracy by policy version, as far as evaluated.
        """
        if not self._ranks.leads:
            return
        complete = self.complete()
        keep = {saved.step for saved in complete[-self._recipe.learner.keep_last :]}
        if self._recipe.learner.keep_best:
            keep |= {saved.step for saved in best(complete, accuracy)}
        for saved in complete:
            if saved.step not in keep:
                self._delete(saved)
        passed = (saved for saved in self._aside(DAMAGED) if complete and saved.step <= complete[-1].step)
        for saved in (*self._aside(AHEAD), *passed):
            shutil.rmtree(saved.folder, ignore_errors=True)

    def _delete(self, saved: Saved) -> None:
        if saved.folder.exists():
            # Renamed first: a half-deleted checkpoint must not look complete.
            doomed = saved.folder.with_name(f".deleted-{saved.step:06d}")
            shutil.rmtree(doomed, ignore_errors=True)
            saved.folder.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def best(complete: list[Saved], accuracy: Mapping[int, float]) -> list[Saved]:
    """The checkpoint with the best held-out accuracy, the later of equals; empty when none was evaluated.

    A checkpoint counts with the newest evaluation of its own version or before.
    """
    scored = []
    for saved in complete:
        known = [version for version in accuracy if version <= saved.step]
        if known:
            scored.append((accuracy[max(known)], saved.step, saved))
    return [max(scored)[2]] if scored else []


def free_bytes(folder: Path) -> int:
    """Bytes that we may still write where `folder` is."""
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def _folder_name(step: int) -> str:
    return f"step-{step:06d}"


def _writer_of(path: Path) -> int:
    """The rank that writes a file of a checkpoint: DeepSpeed's shards name theirs, all else is rank 0's."""
    shard = re.search(r"zero_pp_rank_(\d+)_", path.name)
    return int(shard[1]) if shard else 0


def _step_of(path: Path) -> int:
    number = path.name.removeprefix("step-")
    return int(number) if number.isdigit() else -1


def _generator_state(ranks: Ranks) -> Tensor:
    """torch's generators (the only ones that the learner could draw from), as bytes: CPU, then GPU."""
    states = [torch.get_rng_state()]
    if ranks.device.type == "cuda":
        states.append(torch.cuda.get_rng_state(ranks.device))
    return torch.cat(states)


def _restore_generators(states: list[Tensor], ranks: Ranks) -> None:
    if ranks.rank >= len(states):
        return
    mine, size = states[ranks.rank], len(torch.get_rng_state())
    torch.set_rng_state(mine[:size].clone())
    if ranks.device.type == "cuda" and len(mine) > size:
        torch.cuda.set_rng_state(mine[size:].clone(), ranks.device)
