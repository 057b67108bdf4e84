"""Promises about the meter: every token, prompt and second is booked once, to the replica that it came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from toolchain.errors import ArtifactError
from toolchain.fleet import wire
from toolchain.fleet.control.seats import Seat
from toolchain.fleet.front.meter import Meter
from toolchain.ledger.book import Ledger
from toolchain.ledger.checking import verify
from toolchain.ledger.record import Head, Usage
from toolchain.ledger.totals import report, usages


class Clock:
    """Both clocks of a meter."""

    now_s = 1_700_000_000.0

    def wall(self) -> float:
        return self.now_s

    def steady_ns(self) -> int:
        return int(self.now_s * 1e9)


def node(
    name: str = "n1",
    *replicas: tuple[str, str],
    price: float | None = 0.36,
    gpus: int = 1,
    seat: Seat = Seat((0,)),  # noqa: B008
) -> dict[str, Any]:
    return {
        "node": name,
        "provider": f"of-{name}",
        "device": "rtx4090",
        "gpus": gpus,
        "price_per_hour": price,
        "replicas": [{"name": replica, "state": state, **seat.told()} for replica, state in replicas],
    }


class Scene:
    def __init__(self, path: Path) -> None:
        self.clock, self.path = Clock(), path
        self.meter = Meter(Ledger.open(path, "e"), clock=self.clock.wall, steady_ns=self.clock.steady_ns)

    def seconds(self, count: int, *nodes: Mapping[str, Any]) -> None:
        """A tick each second."""
        for _ in range(count):
            self.meter.tick({f"nodes/{one['node']}": one for one in nodes})
            self.clock.now_s += 1
        self.meter.tick({f"nodes/{one['node']}": one for one in nodes})


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path / "l")


def test_an_answer_that_moved_is_booked_to_both_replicas_in_parts(scene: Scene) -> None:
    scene.seconds(1, node("n1", ("a", "ready")), node("n2", ("b", "ready")))
    booking = scene.meter.booking(7)
    for item in (wire.begun("a"), wire.item([1, 2]), wire.item([]), wire.begun("b"), wire.item([]), wire.item([3])):
        booking.see(item)
    scene.meter.close()
    booked = {one.replica: (one.requests, one.tokens_in, one.tokens_out, one.continued) for one in usages(scene.path)}
    assert booked == {"a": (1, 7, 2, 0), "b": (0, 0, 1, 1)}


def test_a_replica_that_gave_nothing_has_no_request_to_its_name(scene: Scene) -> None:
    scene.seconds(1, node("n1", ("a", "ready"), ("b", "ready")))
    booking = scene.meter.booking(7)
    for item in (wire.begun("a"), wire.item([]), wire.begun("b"), wire.item([3])):
        booking.see(item)
    scene.meter.close()
    booked = {one.replica: (one.requests, one.tokens_in, one.tokens_out, one.continued) for one in usages(scene.path)}
    assert booked == {"a": (0, 0, 0, 0), "b": (1, 7, 1, 0)}


def test_further_answers_of_a_request_do_not_count_it_and_its_prompt_again(scene: Scene) -> None:
    for index in range(3):
        booking = scene.meter.booking(7, counted=index == 0)
        booking.see(wire.begun("a"))
        booking.see(wire.item([1, 2]))
    scene.seconds(1, node("n1", ("a", "ready")))
    scene.meter.close()
    (one,) = usages(scene.path)
    assert (one.node, one.requests, one.tokens_in, one.tokens_out) == ("n1", 1, 7, 6)


def test_a_nodes_time_is_shared_by_those_that_are_ready(scene: Scene) -> None:
    pair = Seat((0, 1), 2)
    scene.seconds(4, node("n1", ("a", "ready"), ("b", "starting"), gpus=2, seat=pair))
    scene.seconds(6, node("n1", ("a", "ready"), ("b", "ready"), gpus=2, seat=pair))
    scene.seconds(5, node("n1", ("a", "down"), ("b", "draining"), gpus=2, seat=pair))
    scene.meter.close()
    booked = {one.replica: (one.node_ms, one.gpu_ms, one.earned) for one in usages(scene.path)}
    assert booked == {"a": (7000, 10000, Decimal("0.0007")), "b": (3000, 6000, Decimal("0.0003"))}


def test_one_of_two_services_has_half_a_gpu_and_the_price_is_earned_once(scene: Scene) -> None:
    half = Seat((0,), 2)
    scene.seconds(6, node("n1", ("a", "ready"), seat=half))
    scene.seconds(6, node("n1", ("a", "ready"), ("b", "ready"), seat=half))
    scene.meter.close()
    booked = {one.replica: (one.node_ms, one.gpu_ms) for one in usages(scene.path)}
    assert booked == {"a": (9000, 6000), "b": (3000, 3000)}
    total = report(scene.path, ("node",)).total.columns()
    assert (total["node_seconds"], total["gpu_seconds"], total["earned_usd"]) == ("12", "9", "0.0012")


def test_a_node_gives_itself_no_more_gpu_time_than_it_was_assigned(scene: Scene) -> None:
    said = {"nodes/n1": node("n1", ("a", "ready"), gpus=8, seat=Seat(tuple(range(8))))}
    for gpus in (8, 0):
        for _ in range(2):
            scene.meter.tick({key: {**one, "gpus": gpus} for key, one in said.items()}, {"n1": {"a": Seat((0,), 2)}})
            scene.clock.now_s += 1
    scene.meter.close()
    assert {one.gpus: (one.node_ms, one.gpu_ms) for one in usages(scene.path)} == {8: (1000, 500), 0: (2000, 0)}
    assert verify(scene.path).sound


def test_what_the_board_no_longer_shows_earns_nothing(scene: Scene) -> None:
    scene.seconds(3, node("n1", ("a", "ready")))
    scene.seconds(20)
    scene.meter.tick({"nodes/n1": node("n1", ("a", "ready"))})
    scene.clock.now_s += 3600  # the head itself stood still
    scene.meter.tick({"nodes/n1": node("n1", ("a", "ready"))})
    scene.meter.close()
    assert sum(one.node_ms for one in usages(scene.path)) == 3000 + 10_000


def test_a_name_that_no_node_has_is_booked_to_nobody(scene: Scene) -> None:
    booking = scene.meter.booking(7)
    booking.see(wire.begun("ghost"))
    booking.see(wire.item([1]))
    scene.seconds(1, node("n1", ("a", "ready")))
    scene.meter.close()
    assert {one.provider for one in usages(scene.path) if one.tokens_out} == {"unknown"}


def test_a_node_earns_nothing_for_replicas_that_are_anothers(scene: Scene) -> None:
    honest, thief = node("n1", ("a", "ready")), node("n2", ("a", "ready"), ("b", "ready"))
    given = {"n1": {"a": Seat((0,))}}
    for _ in range(3):
        scene.meter.tick({"nodes/n2": thief, "nodes/n1": honest, "nodes/n3": {**honest, "node": "n1"}}, given)
        scene.meter.answer("a", tokens_out=10)
        scene.clock.now_s += 1
    scene.meter.close()
    (one,) = usages(scene.path)
    assert (one.node, one.provider, one.tokens_out, one.node_ms) == ("n1", "of-n1", 30, 2000)


@pytest.mark.parametrize(
    "nonsense", [{"price_per_hour": "NaN"}, {"price_per_hour": -1}, {"gpus": "x"}, {"replicas": 3}, {"replicas": [{}]}]
)
def test_a_node_that_talks_nonsense_counts_for_nothing_and_harms_nobody(scene: Scene, nonsense: dict[str, Any]) -> None:
    scene.seconds(2, {**node("n0", ("x", "ready")), **nonsense}, node("n1", ("a", "ready")))
    scene.meter.close()
    assert [(one.node, one.node_ms) for one in usages(scene.path)] == [("n1", 2000)]


def test_intervals_end_with_the_minute_and_a_new_price_is_a_record_of_its_own(scene: Scene) -> None:
    scene.clock.now_s = 1_700_000_040.0  # 20 s after a full minute
    scene.meter.close()
    scene = Scene(scene.path)
    scene.clock.now_s = 1_700_000_060.0
    scene.seconds(30, node("n1", ("a", "ready")))
    scene.seconds(30, node("n1", ("a", "ready"), price=0.72))
    scene.meter.close()
    found = list(usages(scene.path))
    assert {str(one.price_per_hour) for one in found} == {"0.36", "0.72"}
    assert all(one.begin_ms // 60_000 == (one.end_ms - 1) // 60_000 or one.end_ms % 60_000 < 1000 for one in found)
    assert report(scene.path, ("node",)).total.columns()["node_seconds"] == "60"


class Full:
    """A ledger on a full disk, then on one with room."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger, self.full = ledger, True

    @property
    def head(self) -> Head:
        return self.ledger.head

    def append(self, usages: Sequence[Usage]) -> Head:
        if self.full:
            raise ArtifactError("the disk is full")
        return self.ledger.append(usages)

    def close(self) -> None:
        self.ledger.close()


def test_what_cannot_be_written_is_booked_later(tmp_path: Path) -> None:
    clock, said = Clock(), list[str]()
    ledger = Full(Ledger.open(tmp_path / "l", "e"))
    meter = Meter(ledger, said.append, clock=clock.wall, steady_ns=clock.steady_ns)
    for _ in range(200):
        meter.tick({"nodes/n1": node("n1", ("a", "ready"))})
        meter.answer("a", tokens_out=1)
        clock.now_s += 1
    ledger.full = False
    meter.close()
    assert said == ["the disk is full; what was used is kept and booked later"]
    (one,) = usages(tmp_path / "l")
    assert (one.tokens_out, one.node_ms) == (200, 199_000)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(
        st.tuples(st.floats(0.01, 9), st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 50)), max_size=4)),
        max_size=30,
    )
)
def test_nothing_is_lost_and_nothing_counts_twice(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[float, list[tuple[str, int]]]]
) -> None:
    scene = Scene(tmp_path_factory.mktemp("meter") / "l")
    known = {"nodes/n1": node("n1", ("a", "ready"), ("b", "ready")), "nodes/n2": node("n2", ("c", "ready"))}
    scene.meter.tick(known)
    begun_s = scene.clock.now_s
    for apart_s, answers in steps:
        for replica, tokens in answers:
            scene.meter.answer(replica, tokens_out=tokens)
        scene.clock.now_s += apart_s
        scene.meter.tick(known)
    scene.meter.close()
    assert verify(scene.path).sound
    found = report(scene.path, ("node",))
    assert found.total.tokens_out == sum(tokens for _apart_s, answers in steps for _replica, tokens in answers)
    spans_ms = [total.node_ms for total in found.groups.values()]
    assert all(abs(span - 1000 * (scene.clock.now_s - begun_s)) <= 3 for span in spans_ms)


def test_rates_are_tokens_of_the_last_seconds(scene: Scene) -> None:
    for _ in range(30):
        scene.meter.answer("a", tokens_out=50)
        scene.seconds(1, node("n1", ("a", "ready")))
    assert 40 <= scene.meter.rates()["a"] <= 60
    scene.seconds(30, node("n1", ("a", "ready")))
    assert scene.meter.rates()["a"] == 0
