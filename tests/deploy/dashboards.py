"""What the Grafana dashboard asks, taken apart."""

from __future__ import annotations

import json
import re
from pathlib import Path

DASHBOARD = Path(__file__).resolve().parents[2] / "deploy" / "grafana" / "dashboard.json"
SELECTOR = re.compile(r"(slipstream_\w+)\{([^}]*)\}")
MATCHER = re.compile(r'(\w+)(=~|=)"([^"]*)"')


def panels() -> list[dict]:
    """Panels that show something."""
    return [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]


def expressions() -> list[str]:
    """Every query of every panel."""
    return [target["expr"] for panel in panels() for target in panel["targets"]]


def selectors() -> list[tuple[str, dict[str, re.Pattern]]]:
    """Series that queries select: metric name, and patterns of labels other than `instance`."""
    found = []
    for expression in expressions():
        for name, matchers in SELECTOR.findall(expression):
            labels = {
                label: re.compile(value if kind == "=~" else re.escape(value))
                for label, kind, value in MATCHER.findall(matchers)
                if label != "instance"
            }
            found.append((name, labels))
    return found
