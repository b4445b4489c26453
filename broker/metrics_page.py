"""The Prometheus page, on loopback only.

Invariant: the loop alone reads the broker's state; it copies numbers into the metrics once in a while, so that a
scrape, from the page's own thread, never sees half a change. ACK latency is counted as it happens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Gauge, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from broker.service import Service
from common.errors import UserError

UPDATE_S = 1.0
Labelled = dict[tuple[str, ...], float]  # by the values of its labels
LEASE_AGES_S = (1, 5, 15, 60, 300, 900, 3600)


class _Copied:
    """A collector of what was last copied: what has labels that come and go, counters, histograms."""

    def __init__(self) -> None:
        # name -> help text, label names, label values -> number; replaced whole, so that no scrape sees half
        self.gauges: dict[str, tuple[str, list[str], Labelled]] = {}
        self.counters: dict[str, tuple[str, float]] = {}
        self.staleness: dict[int, int] = {}
        self.ages: list[float] = []

    def collect(self) -> Any:
        """Called by prometheus-client at each scrape."""
        for name, (help_text, labels, values) in self.gauges.items():
            family = GaugeMetricFamily(name, help_text, labels=labels)
            for key, value in values.items():
                family.add_metric(key, value)
            yield family
        for name, (help_text, value) in self.counters.items():
            yield CounterMetricFamily(name, help_text, value=value)
        yield _histogram(
            "slipstream_staleness_versions", "Staleness of trained tokens, in versions.", self.staleness
        )
        ages = {edge: sum(age <= edge for age in self.ages) for edge in LEASE_AGES_S}
        buckets = [(str(edge), float(count)) for edge, count in ages.items()] + [
            ("+Inf", float(len(self.ages)))
        ]
        yield HistogramMetricFamily(
            "slipstream_lease_age_seconds", "Ages of the leases in flight.", buckets, sum(self.ages)
        )


def _histogram(name: str, text: str, counts: dict[int, int]) -> HistogramMetricFamily:
    buckets, seen = [], 0
    for value in sorted(counts):
        seen += counts[value]
        buckets.append((str(value), float(seen)))
    total = float(sum(value * count for value, count in counts.items()))
    return HistogramMetricFamily(name, text, [*buckets, ("+Inf", float(seen))], total)


def _numbers(values: Mapping[str, Any]) -> Labelled:
    return {(name,): float(value) for name, value in values.items() if isinstance(value, int | float)}


class MetricsPage:
    """Serves /metrics on 127.0.0.1.

    Args:
        port: TCP port; 0 picks a free one (see `port`).

    Raises:
        UserError: the port is in use.
    """

    def __init__(self, port: int) -> None:
        self._registry = CollectorRegistry()
        self._copied = _Copied()
        self._registry.register(self._copied)
        self._groups = Gauge("slipstream_groups", "Leases by state (I3).", ["state"], registry=self._registry)
        self._run = Gauge("slipstream_run", "Where the run stands.", ["what"], registry=self._registry)
        self._peers = Gauge("slipstream_peers", "Living peers.", ["role"], registry=self._registry)
        self.ack_seconds = Histogram(
            "slipstream_ack_seconds", "From the receipt of a round to its replies.", registry=self._registry
        )
        try:
            self._server, self._thread = start_http_server(port, addr="127.0.0.1", registry=self._registry)
        except OSError:
            raise UserError(
                f"port {port} is in use; take another, or 0 for a free one.", setting="broker.metrics_port"
            ) from None
        self.port: int = self._server.server_port
        self._next = 0.0

    def update(self, service: Service, now: float) -> None:
        """Copy the broker's numbers, at most once per `UPDATE_S`."""
        if now < self._next:
            return
        self._next = now + UPDATE_S
        state = service.state
        counts = state.ledger.counts()
        for name in ("in_flight", "buffered", "taken", "consumed", "filtered", "expired", "abandoned"):
            self._groups.labels(name).set(counts[name])
        for what, value in (
            ("step", state.ledger.step),
            ("version", state.ledger.version),
            ("era", state.ledger.era),
            ("ledger_sum_ok", counts["sum_ok"]),
            ("disk_full", state.disk_full is not None),
            ("store_bytes", state.store.bytes_held),
            ("no_progress_seconds", state.standstill.seconds(now)),
            ("stalled", state.standstill.alarmed),
            ("standstills", state.standstill.alarms),
            ("learner_waits_seconds", service.learner.waiting_since(now) or 0.0),
        ):
            self._run.labels(what).set(float(value))
        self._update_peers(service)
        self._update_copies(service, now)

    def _update_peers(self, service: Service) -> None:
        members = service.state.members
        for role in ("actor", "learner", "observer"):
            self._peers.labels(role).set(len(members.living(role)))

    def _update_copies(self, service: Service, now: float) -> None:
        state, meters = service.state, service.state.meters
        peers, results = state.members.living(), state.evaluations.results
        rates: Labelled = {(p.name,): p.token_rate.per_second(now) for p in peers if p.role == "actor"}
        readings: Labelled = {(p.name, meter): value for p in peers for meter, value in p.telemetry.items()}
        evaluation = _numbers(next(reversed(results.values()), {}))
        self._copied.gauges = {
            "slipstream_actor_tokens_per_second": ("Published tokens.", ["actor"], rates),
            "slipstream_telemetry": ("Meters in the peers' heartbeats.", ["peer", "meter"], readings),
            "slipstream_learner": (
                "The newest step, learner/NAME in MLflow.",
                ["name"],
                _numbers(state.last_train or {}),
            ),
            "slipstream_actor": (
                "What was sampled up to the newest step, actor/NAME in MLflow.",
                ["name"],
                _numbers(meters.rollouts.last),
            ),
            "slipstream_eval": ("The newest held-out evaluation, eval/NAME in MLflow.", ["name"], evaluation),
        }
        self._copied.counters = {
            "slipstream_leases": ("Leases ever granted.", float(state.ledger.granted)),
            "slipstream_payload_bytes_in": ("Payload published.", float(meters.bytes_in)),
            "slipstream_payload_bytes_out": ("Payload fetched.", float(meters.bytes_out)),
            "slipstream_messages_in": ("Messages received.", float(meters.messages_in)),
            "slipstream_bad_messages": ("Malformed messages.", float(meters.bad_messages)),
        }
        self._copied.staleness = dict(meters.staleness)
        self._copied.ages = [now - group.granted for group in state.ledger.leased]

    def close(self) -> None:
        """Stop serving the page."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(1.0)
