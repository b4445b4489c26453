"""The network: addresses, ports, whether two processes meet, whether clocks agree."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from common.errors import UserError
from common.ports import free_port
from common.recipe import Recipe
from deploy.doctoring import handshake
from deploy.doctoring.findings import Finding, ok, problem, warning

START_S = 60.0  # importing torch on a busy host
SKEW_WARNING_S, SKEW_PROBLEM_S = 1.0, 30.0


def address_of(interface: str) -> str:
    """IPv4 address of an interface.

    Raises:
        UserError: there is no such interface, or it has no address.
    """
    found = psutil.net_if_addrs()
    if interface not in found:
        raise UserError(
            f"there is no interface '{interface}'; there are: {', '.join(found)}.", setting="--interface"
        )
    for entry in found[interface]:
        if entry.family == socket.AF_INET:
            return entry.address
    raise UserError(f"'{interface}' has no IPv4 address.", setting="--interface")


def check_ports(recipe: Recipe) -> Iterator[Finding]:
    """Addresses have keys where they need them, and ports that the recipe fixes are free."""
    from deploy.preflight import check_addresses
    from deploy.preflight import check_ports as ports_are_free

    check_addresses(recipe)
    ports_are_free(recipe)
    fixed = [p for p in (recipe.broker.port, recipe.broker.metrics_port, recipe.weights.port) if p]
    yield ok("ports", f"{', '.join(map(str, fixed))} free" if fixed else "the recipe takes free ports")


def check_keys(recipe: Recipe) -> Iterator[Finding]:
    """Keys are there and nobody else can read them."""
    if recipe.broker.keys is None:
        return
    from common.keys import check_server

    check_server(recipe.broker.keys)
    yield ok("keys", f"{recipe.broker.keys} holds keys that only you can read")


def check_name() -> Iterator[Finding]:
    """This host's name leads to this host."""
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        yield warning("host name", f"'{name}' cannot be resolved: {error}", "add it to DNS or /etc/hosts")
        return
    mine = {entry.address for entries in psutil.net_if_addrs().values() for entry in entries}
    if address in mine or address.startswith("127."):
        yield ok("host name", f"{name} is {address}")
    else:
        yield warning(
            "host name", f"'{name}' is {address}, which is not this host's", "correct DNS or /etc/hosts"
        )


def check_meeting(interface: str | None, backend: str, timeout_s: float = 30.0) -> Iterator[Finding]:
    """Two processes on this host meet over the interface."""
    host = address_of(interface) if interface else "127.0.0.1"
    address = f"{host}:{free_port(host)}"
    sides = [handshake.start(rank, address, backend, interface, timeout_s) for rank in range(2)]
    deadline = time.monotonic() + START_S + timeout_s
    yield from _outcome(backend, [handshake.finish(side, deadline) for side in sides], interface or host)


def check_peer(
    listen: str | None, meet: str | None, interface: str | None, backend: str, timeout_s: float = 120.0
) -> Iterator[Finding]:
    """This process meets one on another host: one of them listens, the other comes."""
    address = listen or meet
    assert address is not None
    side = handshake.start(0 if listen else 1, address, backend, interface, timeout_s)
    outcome = handshake.finish(side, time.monotonic() + START_S + timeout_s)
    yield from _outcome(backend, [outcome], address)


def _outcome(backend: str, outcomes: list[tuple[dict | None, str]], where: str) -> Iterator[Finding]:
    failures = [reason for result, reason in outcomes if result is None]
    if failures:
        yield problem(
            backend,
            f"two processes do not meet at {where}: {failures[0]}",
            "open the ports between the hosts, and name the interface that joins them: --interface, "
            f"{backend.upper()}_SOCKET_IFNAME",
        )
        return
    result = outcomes[0][0]
    assert result is not None
    yield ok(
        backend, f"two processes met at {where} in {result['seconds']:.1f} s, {result['gib_per_s']:.2f} GiB/s"
    )


def backends(sides: int) -> list[str]:
    """What can be tried here: gloo always, NCCL where each of the `sides` on this host has a GPU of its own."""
    from common.telemetry import visible_gpus

    return ["gloo", "nccl"] if len(visible_gpus()) >= sides else ["gloo"]


def check_skew(address: str, keys: Path | None) -> Iterator[Finding]:
    """This host's clock against the broker's."""
    from deploy.watch import ask_status

    before = time.time()
    there = float(ask_status(address, keys)["time"])
    after = time.time()
    yield skew_finding(there - (before + after) / 2, (after - before) / 2, address)


def skew_finding(skew_s: float, uncertainty_s: float, address: str) -> Finding:
    """What a difference between two clocks means."""
    text = f"{abs(skew_s):.2f} s {'behind' if skew_s > 0 else 'ahead of'} the broker at {address}"
    if uncertainty_s:
        text += f" (± {uncertainty_s:.2f} s)"
    advice = "let chronyd or systemd-timesyncd keep both clocks"
    if abs(skew_s) - uncertainty_s > SKEW_PROBLEM_S:
        return problem("clock", text, advice)
    if abs(skew_s) - uncertainty_s > SKEW_WARNING_S:
        return warning("clock", text, advice)
    return ok("clock", text)


def chosen_interface(option: str | None) -> str | None:
    """--interface, else what NCCL or gloo are told by the environment."""
    told = os.environ.get("NCCL_SOCKET_IFNAME") or os.environ.get("GLOO_SOCKET_IFNAME")
    return option or (told if told and told.isalnum() else None)
