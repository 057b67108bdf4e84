"""What a gateway counts, for Prometheus; and what the Tritons behind it count, passed on with the label ``triton``, or
``node`` and ``replica``; and what engines with speculative decoding draft.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families

from toolchain.gateway.engines import Relayed
from toolchain.gateway.kv import Drafts

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_TTFT_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_ITL_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1, 5)
_REQUEST_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """One gateway's own; a registry of its own, so that two gateways in a process do not mix."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        name = "scalellm_gateway_"
        self.requests = Counter(f"{name}requests", "Requests answered.", ["route", "status"], registry=registry)
        self.seconds = Histogram(
            f"{name}request_seconds",
            "From the request to its last byte.",
            ["route"],
            buckets=_REQUEST_S,
            registry=registry,
        )
        self.ttft = Histogram(
            f"{name}ttft_seconds", "From the request to its first token.", buckets=_TTFT_S, registry=registry
        )
        self.itl = Histogram(
            f"{name}itl_seconds", "Between tokens, by piece: time over tokens.", buckets=_ITL_S, registry=registry
        )
        self.prompt_tokens = Counter(f"{name}prompt_tokens", "Tokens of prompts.", registry=registry)
        self.answer_tokens = Counter(f"{name}completion_tokens", "Generated tokens.", registry=registry)
        self.running = Gauge(f"{name}running", "Requests at the engines.", registry=registry)
        self.waiting = Gauge(f"{name}waiting", "Requests that wait for a place.", registry=registry)
        self.retries = Counter(f"{name}retries", "Requests sent again after a Triton failed.", registry=registry)
        self.cancelled = Counter(f"{name}cancelled", "Requests whose client went away.", registry=registry)
        self.up = Gauge(f"{name}triton_up", "Whether a Triton generates.", ["triton"], registry=registry)

    def text(self, relayed: Sequence[Relayed], drafts: Mapping[str, Drafts | None]) -> bytes:
        """Prometheus' text format; ``drafts``: of the engine behind each Triton, by its URL."""
        return generate_latest(self.registry) + generate_latest(_Drafted(drafts)) + generate_latest(_Relayed(relayed))


class _Drafted(CollectorRegistry):
    """Drafted and accepted tokens of each engine that says so; their ratio is the acceptance rate."""

    def __init__(self, drafts: Mapping[str, Drafts | None]) -> None:
        super().__init__()
        self._drafts = drafts

    def collect(self) -> Iterable[Metric]:
        name = "scalellm_engine_"
        drafted = CounterMetricFamily(f"{name}drafted_tokens", "Tokens that were drafted.", labels=["triton"])
        accepted = CounterMetricFamily(f"{name}accepted_tokens", "Those that the model kept.", labels=["triton"])
        for triton, drafts in self._drafts.items():
            if drafts is not None:
                drafted.add_metric([triton], drafts.drafted)
                accepted.add_metric([triton], drafts.accepted)
        return [family for family in (drafted, accepted) if family.samples]


class _Relayed(CollectorRegistry):
    """The metrics of others: one family a name, and on each sample the labels that say whose it is."""

    def __init__(self, texts: Sequence[Relayed]) -> None:
        super().__init__()
        self._texts = texts

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        for one in self._texts:
            for family in _families(one.text):
                merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    merged.samples.append(sample._replace(labels={**sample.labels, **one.labels}))
        return families.values()


def _families(text: str) -> Iterator[Metric]:
    try:
        yield from text_string_to_metric_families(text)
    except ValueError:  # not Prometheus' format after all: then there is nothing to pass on
        return
