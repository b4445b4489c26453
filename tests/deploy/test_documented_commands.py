"""Every command in README.md and docs/start.md is executed here, as it stands in the text.

The rule. Commands are the lines of fenced blocks (those of Python aside: tests/learner/test_learner_export.py loads a
model like that), and every inline `slipstream ...` and `make ...`. Each is run by the
real command line, in a folder that holds only the shipped models, in this order of preference:

- really, where that takes seconds and needs neither GPU nor cluster: `check`, `status` (against a real broker),
  `keys`, `grade`, `units`, `submit` (with --dry-run added where it is not given, and in a folder that it has prepared where
  it resumes), --help for a bare verb;
- up to the point where work would begin, where it starts engines or jobs: `run`, `actor` and `scale` are parsed by
  the real parser, their recipe, overrides, run folder and keys are resolved, and the function that would then start
  the work is asked whether it got them. tests/e2e and tests/slurm run what is behind it;
- `make TARGET` must be a target of the Makefile (`make demo` and `make test` are run whole by CI and by the README's
  readers), `mlflow ...` must be accepted by mlflow's own parser.

A command of a new kind fails here until somebody says how it is to be executed.
"""

from __future__ import annotations

import itertools
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from deploy import cli
from tests.scripted.broker import running_broker, scripted_recipe

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "docs/start.md")
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:slipstream|make) [^`]+)`")
PLACEHOLDERS = {
    "HOST:PORT": "10.1.2.3:5555",
    "=HOST": "=10.1.2.3",
    "=PORT": "=5555",
    "<this repository>": "repository",
}
# The reader's shell and the hub's own client, not ours.
ELSEWHERE = ("git clone", "cd ", "source .venv/bin/activate", "hf download")


def commands() -> list[tuple[str, str]]:
    """(page, command) of all commands, in the order of the text, each once per page."""
    found: dict[tuple[str, str], None] = {}
    for page in PAGES:
        text = (REPOSITORY / page).read_text(encoding="utf-8")
        blocks = [block for language, block in FENCED.findall(text) if language != "python"]
        lines = [line for block in blocks for line in block.splitlines()]
        for line in [*lines, *INLINE.findall(FENCED.sub("", text))]:
            for part in line.split("#")[0].split("&&"):
                if part.strip():
                    found[page, part.strip()] = None
    return list(found)


def test_the_pages_have_commands() -> None:
    seen = {command.split()[0] for _, command in commands()}
    assert {"make", "slipstream", "mlflow"} <= seen
    assert len(commands()) > 15


@pytest.mark.parametrize(("page", "command"), commands())
def test_command(page: str, command: str, place: Place) -> None:
    if command.startswith(ELSEWHERE):
        return
    for placeholder, value in PLACEHOLDERS.items():
        command = command.replace(placeholder, value)
    program, *arguments = shlex.split(command)
    {"make": place.make, "mlflow": place.mlflow, "slipstream": place.slipstream}[program](arguments)


class Place:
    """A folder to run commands in, and what they need to find there."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
        self.folder, self._patch, self._capsys = folder, monkeypatch, capsys

    # --- programs ------------------------------------------------------------------------------------------

    def make(self, targets: list[str]) -> None:
        """Each is a target, with a line in `make help`."""
        text = (REPOSITORY / "Makefile").read_text()
        for target in targets:
            assert re.search(rf"^{target}:.*## ", text, re.MULTILINE), f"no target '{target}'"

    def mlflow(self, arguments: list[str]) -> None:
        """Parsed by mlflow, not carried out: it would serve for ever."""
        from mlflow.cli import cli as mlflow

        name, *options = arguments
        command = mlflow.get_command(
            mlflow.make_context("mlflow", [name, *options], resilient_parsing=True), name
        )
        assert command is not None
        command.make_context(name, options)

    def slipstream(self, arguments: list[str]) -> None:
        """By verb; see the module's docstring."""
        verb = arguments[0]
        if len(arguments) == 1 or verb.startswith("-"):
            self.call([verb] if verb.startswith("-") else [verb, "--help"])
            return
        getattr(self, f"_{verb}")(arguments)

    def call(self, arguments: list[str], code: int = 0) -> str:
        """Run the command line; returns what it printed."""
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        said = self._capsys.readouterr()
        assert (ended.value.code or 0) == code, said.out + said.err
        return said.out

    # --- verbs ---------------------------------------------------------------------------------------------

    def _check(self, arguments: list[str]) -> None:
        assert "batch" in self.call(arguments)
        assert not (self.folder / "runs").exists()

    def _keys(self, arguments: list[str]) -> None:
        self.call(arguments)
        assert list(self.folder.rglob("*.key_secret"))

    def _grade(self, arguments: list[str]) -> None:
        rows = [{"response": r"\boxed{4}", "gold": "4"}, {"response": r"\boxed{5}", "gold": "4"}]
        (self.folder / arguments[1]).write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert "correct" in self.call(arguments)

    def _submit(self, arguments: list[str]) -> None:
        if "--resume" in arguments:
            self.call(["submit", "paper-7b", "--actors", "12", "--dry-run"])
            (self.folder / "runs" / "paper-7b" / "metrics.jsonl").touch()
        self.call([*arguments, *([] if "--dry-run" in arguments else ["--dry-run"])])
        written = list(self.folder.glob("runs/*/slurm/*.sbatch"))
        assert {path.name for path in written} == {"head.sbatch", "actors.sbatch"}
        options = dict(itertools.pairwise(arguments))
        head, actors = sorted(written, key=lambda path: path.name, reverse=True)
        assert f"--array=0-{int(options.get('--actors', 12)) - 1}" in actors.read_text()
        if "--partition" in options:
            assert f"--partition={options['--partition']}" in head.read_text()

    def _units(self, arguments: list[str]) -> None:
        import deploy.launch.machine as machine
        import deploy.preflight as preflight

        gpus = [str(number) for number in range(8)]
        self._patch.setattr(machine, "this_machine", lambda: (list(range(64)), gpus))
        self._patch.setattr(preflight, "preflight", lambda recipe, **_: preflight.check_addresses(recipe))
        said = self.call(arguments)
        roles = [value for option, value in itertools.pairwise(arguments) if option == "--host-role"]
        written = {path.name for path in self.folder.glob("runs/*/systemd/*/*.service")}
        assert written == {f"slipstream-{role}{'@' if role == 'actor' else ''}.service" for role in roles}
        assert ("--join 10.1.2.3:5555" in said) == ("broker" in roles)

    def _status(self, arguments: list[str]) -> None:
        recipe = scripted_recipe(self.folder, run={"name": arguments[1], "root": self.folder / "runs"})
        self._write_recipe(recipe)
        with running_broker(recipe):
            assert ("sum_ok" if "--ledger" in arguments else "step 0/5") in self.call(arguments)

    def _scale(self, arguments: list[str]) -> None:
        import deploy.slurm.scale as on_slurm
        from common.recipe import load_recipe
        from deploy.slurm.state import State, write_state

        run = arguments[1]
        self._write_recipe(load_recipe(run))
        folder = self.folder / "runs" / run
        (folder / "slurm").mkdir()
        write_state(folder, State(run=run, head=1))
        asked = self._instead_of(on_slurm, "scale_array", "done")
        assert "done" in self.call(arguments)
        assert asked == [((folder, int(arguments[3])), {})]

    def _run(self, arguments: list[str]) -> None:
        import deploy.preflight as preflight
        import deploy.run as on_this_machine

        _, name, *options = arguments
        rows = [{"problem": f"{n} + 1", "answer": str(n + 1)} for n in range(400)]
        (self.folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        asked = self._instead_of(on_this_machine, "run_here", 0)
        if name != "demo":
            self._instead_of(preflight, "preflight", None)  # the model of a full-size run is not here
        if "--resume" in options:
            self.call([part for part in arguments if part != "--resume"])
        self.call(arguments)
        (recipe, folder), how = asked[-1]
        assert how["resume"] == ("--resume" in options)
        assert folder == Path("runs") / recipe.run.name
        assert (folder / "recipe.toml").is_file()
        for key, value in [part.split("=", 1) for part in options if "=" in part]:
            section, setting = key.split(".")
            assert str(getattr(getattr(recipe, section), setting)) == value

    def _actor(self, arguments: list[str]) -> None:
        import actors.main as worker
        import common.process as process

        asked = self._instead_of(worker, "run_actor", 0)
        self._patch.setattr(process, "leave", _exit)
        options = dict(zip(arguments[1::2], arguments[2::2], strict=True))
        if "--run" in options:  # read from the run folder, tests/deploy/test_find_broker.py
            import deploy.workers as workers

            asked_for = self._instead_of(workers, "_find_broker", ("its address", None))
        self.call(arguments)
        if "--run" in options:
            assert asked_for == [((None, options["--run"], None), {})]
        keys = Path(options["--keys"]) if "--keys" in options else None
        assert asked == [((options.get("--join", "its address"),), {"name": None, "keys": keys})]

    # --- means ---------------------------------------------------------------------------------------------

    def _instead_of(self, module: Any, name: str, answer: Any) -> list[tuple[tuple, dict]]:
        """Replace what would start the work by a note of how it was called."""
        calls: list[tuple[tuple, dict]] = []

        def note(*arguments: Any, **options: Any) -> Any:
            calls.append((arguments, options))
            return answer

        assert callable(getattr(module, name))
        self._patch.setattr(module, name, note)
        return calls

    def _write_recipe(self, recipe: Any) -> None:
        from common.recipe import resolved_toml

        recipe.folder.mkdir(parents=True)
        (recipe.folder / "recipe.toml").write_text(resolved_toml(recipe))


def _exit(code: int) -> None:
    raise SystemExit(code)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Place:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").symlink_to(REPOSITORY / "models")
    monkeypatch.setenv("COLUMNS", "200")
    return Place(tmp_path, monkeypatch, capsys)
