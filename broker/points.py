"""The points that the broker logs with each step: what it holds, what the actors do, what everybody uses.

Invariant: names are those of `common.tracking.catalogue`; what was not measured is left out. A point's size does
not grow with the run beyond `PEERS_SHOWN` peers: above that there are sums, means and extremes over all actors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from broker.members import Peer
from broker.state import RunState
from common.tracking.catalogue import plain

PEERS_SHOWN = 32
MIB = 1 << 20


def step_points(state: RunState, scheduled: int, filtered: int, now: float) -> dict[str, dict[str, float]]:
    """Points by kind, for a step that has been committed; closes the window of the rollouts.

    Args:
        scheduled: groups of the step.
        filtered: of these, filtered for equal rewards.
        now: broker's monotonic clock.
    """
    actors = state.members.living("actor")
    return {
        "broker": broker_point(state, scheduled, filtered),
        "actor": state.meters.rollouts.close_window() | fleet_point(actors, state.ledger.version, now),
        "system": system_point([*state.members.living("learner"), *actors]),
    }


def broker_point(state: RunState, scheduled: int, filtered: int) -> dict[str, float]:
    """What the broker holds, and what went through it so far."""
    counts, staleness, meters = state.ledger.counts(), state.meters.staleness_view(), state.meters
    sampled, trained = meters.lengths["sampled"], meters.lengths["trained"]
    point = {
        "filtered_share": filtered / scheduled,
        "staleness_max": float(staleness["last_max"]),
        "staleness_mean": staleness["mean"],
        "ledger_sum_ok": float(counts["sum_ok"]),
        "store_mb": state.store.bytes_held / MIB,
        "in_mb": meters.bytes_in / MIB,
        "out_mb": meters.bytes_out / MIB,
        "bad_messages": float(meters.bad_messages),
    }
    point |= {name: float(counts[name]) for name in ("in_flight", "buffered", "expired", "abandoned")}
    for name, lengths in (("sampled", sampled), ("trained", trained)):
        if lengths.count:
            point[f"length_{name}"] = lengths.total / lengths.count
            point[f"length_{name}_p90"] = lengths.quantile(0.9)
    return point


def fleet_point(actors: Sequence[Peer], version: int, now: float) -> dict[str, float]:
    """The actors together, as of their last heartbeats."""
    point = {
        "count": float(len(actors)),
        "waiting": float(sum(peer.waiting_for is not None for peer in actors)),
        "tokens_per_s": sum(peer.token_rate.per_second(now) for peer in actors),
    }
    behind = [float(version - peer.version) for peer in actors]
    readings: list[tuple[str, Callable[[list[float]], float], list[float]]] = [
        ("versions_behind", _mean, behind),
        ("versions_behind_max", max, behind),
        ("gpu_use", _mean, _gpu_readings(actors, "use")),
        ("gpu_memory_share", _mean, _gpu_readings(actors, "memory_share")),
    ]
    together: dict[str, Callable[[list[float]], float]] = {
        "sequences": sum,
        "kv_use": _mean,
        "verifier_queue": sum,
        "weights_staged_s": max,
        "weights_stopped_ms": max,
        "weights_probe_mean": max,
        "weights_probe_max": max,
        "cpu_cores": sum,
        "rss_mb": sum,
    }
    for name, combine in together.items():
        readings.append((name, combine, [p.telemetry[name] for p in actors if name in p.telemetry]))
    return point | {name: combine(values) for name, combine, values in readings if values}


def system_point(peers: Iterable[Peer]) -> dict[str, float]:
    """Processor, memory and GPUs of the first `PEERS_SHOWN` peers."""
    return {
        f"{plain(peer.name)}/{meter}": value
        for peer in list(peers)[:PEERS_SHOWN]
        for meter, value in peer.telemetry.items()
        if meter in ("cpu_cores", "rss_mb") or _gpu_meter(meter) is not None
    }


def _gpu_readings(peers: Iterable[Peer], meter: str) -> list[float]:
    return [value for peer in peers for name, value in peer.telemetry.items() if _gpu_meter(name) == meter]


def _gpu_meter(name: str) -> str | None:
    """`use` of `gpu0_use`; None where the name is not a GPU's (see `common.telemetry`)."""
    head, _, meter = name.partition("_")
    return meter if head.startswith("gpu") and head[3:].isdigit() and meter else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
