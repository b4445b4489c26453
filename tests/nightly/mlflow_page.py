"""The MLflow page of a run in a headless Chromium, driven by the DevTools protocol.

usage: python -m tests.nightly.mlflow_page RUN_FOLDER PNG

Delivers the run's points to a fresh MLflow store with a server of its own, opens the run's metrics, and writes
the picture that the docs show: a few charts of each group.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from websockets.sync.client import ClientConnection, connect

from common.run_files import RECIPE_FILE
from common.tracking.shipper import Shipper
from common.tracking.tags import run_tags
from deploy.folder import read_recipe
from tests.common.mlflow_server import MlflowServer

WAIT_S = 180.0
WIDTH, HEIGHT = 1300, 2060
SHOWN = {
    "actor": ("accuracy", "length", "groups_equal_reward"),
    "broker": ("buffered", "in_flight", "staleness_max"),
    "learner": ("reward", "entropy_mean", "grad_norm"),
    "eval": ("pass1", "greedy", "length"),
}
SECTION = '[data-testid="experiment-view-compare-runs-section-header"]'
CARD = '[data-testid="experiment-view-compare-runs-card"]'


def find_chromium() -> str | None:
    """A Chromium or Chrome on this machine."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


class Page:
    """A tab of a browser."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket, self._numbers = socket, itertools.count(1)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Result of a DevTools method."""
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            reply = json.loads(self._socket.recv(timeout=WAIT_S))
            if reply.get("id") == number:
                assert "error" not in reply, reply
                return reply["result"]

    def evaluate(self, expression: str) -> Any:
        """Value of a JavaScript expression."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        return result["result"].get("value")

    def until(self, expression: str, what: str) -> None:
        """Wait until a JavaScript expression is true."""
        deadline = time.monotonic() + WAIT_S
        while not self.evaluate(expression):
            assert time.monotonic() < deadline, f"the page never showed {what}"
            time.sleep(0.3)

    def type(self, selector: str, text: str) -> None:
        """Type into a field."""
        self.evaluate(f"document.querySelector({json.dumps(selector)}).focus()")
        self.call("Input.insertText", text=text)

    def picture(self) -> bytes:
        """PNG of what is visible."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])


@contextmanager
def browser(chromium: str) -> Iterator[Page]:
    """A headless browser with one tab."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [chromium, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [
            "--remote-debugging-port=0",
            f"--window-size={WIDTH},{HEIGHT}",
            f"--user-data-dir={profile}",
        ]
        process = subprocess.Popen([*command, "about:blank"], stderr=subprocess.DEVNULL)
        try:
            with connect(_tab(Path(profile)), max_size=None) as socket:
                yield Page(socket)
        finally:
            process.kill()
            process.wait()


def _tab(profile: Path) -> str:
    """WebSocket address of the browser's first tab."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        try:
            port = (profile / "DevToolsActivePort").read_text().splitlines()[0]
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=5) as reply:
                tabs = [tab for tab in json.load(reply) if tab["type"] == "page"]
            if tabs:
                return tabs[0]["webSocketDebuggerUrl"]
        except (OSError, IndexError):
            pass
        time.sleep(0.2)
    raise TimeoutError("the browser did not start")


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """A server that holds the points of a run folder; yields the address of the run's metrics."""
    recipe = read_recipe(folder)
    with tempfile.TemporaryDirectory() as place:
        server, copy = MlflowServer(Path(place)), Path(place) / "run"
        copy.mkdir()
        for name in ("metrics.jsonl", RECIPE_FILE):
            shutil.copy(folder / name, copy / name)
        server.start()
        try:
            shipper = Shipper(
                copy,
                server.url,
                recipe.tracking.experiment,
                recipe.run.name or folder.name,
                tags=run_tags(recipe, folder),
                files=[copy / RECIPE_FILE],
            )
            end = shipper.deliver()
            if end is not None:
                shipper.finish(end, [folder / "summary.json", folder / "progress.png"])
            assert shipper.url is not None
            yield shipper.url
        finally:
            server.kill()


def open_metrics(page: Page, url: str) -> None:
    """Open the metrics of a run and wait for its chart sections."""
    page.call("Page.navigate", url=url)
    page.until(f"document.querySelectorAll('{SECTION}').length > 1", "chart sections")


def tidy(page: Page) -> None:
    """The view for training runs, without the assistant and the charts' buttons."""
    find = "[...document.querySelectorAll('[role=button]')].find(e => e.innerText === 'Model training')"
    page.evaluate(f"{find}?.click()")
    page.evaluate("document.querySelector('button[aria-label=Close]')?.click()")
    page.evaluate(
        "document.head.insertAdjacentHTML('beforeend', '<style>.modebar { display: none }</style>')"
    )
    time.sleep(1.0)


def sections(page: Page) -> dict[str, int]:
    """Chart sections of the page and how many charts each has."""
    texts = page.evaluate(f"[...document.querySelectorAll('{SECTION}')].map(e => e.innerText)")
    found = (re.match(r"\s*(\S+)\s*\((\d+)\)", text) for text in texts)
    return {match[1]: int(match[2]) for match in found if match}


def show_some(page: Page) -> None:
    """Show the charts of `SHOWN` only, and wait until they are drawn."""
    names = "|".join(f"{group}/({'|'.join(names)})" for group, names in SHOWN.items())
    page.type('input[placeholder="Search metric charts"]', f"^({names})$")
    wanted = sum(len(names) for names in SHOWN.values())
    page.until(f"document.querySelectorAll('{CARD}').length === {wanted}", f"{wanted} charts")
    page.until(f"document.querySelectorAll('{CARD} svg.main-svg').length >= {wanted}", "drawn charts")
    time.sleep(1.0)  # the lines are drawn after their axes


def main(folder: Path, target: Path) -> None:
    """Take the picture."""
    chromium = find_chromium()
    if chromium is None:
        sys.exit("no chromium here; on Debian: apt-get install chromium")
    with served(folder) as url, browser(chromium) as page:
        open_metrics(page, url)
        print(sections(page))
        tidy(page)
        open_metrics(page, url)
        show_some(page)
        image = Image.open(io.BytesIO(page.picture()))
    image.convert("RGB").quantize(64, dither=Image.Dither.NONE).save(target, optimize=True)
    print(f"{target}: {target.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
