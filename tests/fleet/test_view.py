"""Promises about what a gateway over several replicas shows: ``/status`` and ``/metrics``, by what the nodes say."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.fleet.shown import Shown, replica, showing
from tests.gateway.behind_gateway import Gateway, settings_for
from toolchain.ledger.record import Head


@pytest.fixture
def shown(tmp_path: Path) -> Iterator[Shown]:
    found = Shown(tmp_path / "parrot")
    yield found
    found.close()


@pytest.fixture
def door(shown: Shown, parrot: Path) -> Iterator[Gateway]:
    with showing(shown, settings_for(parrot)) as found:
        yield found


def status(door: Gateway) -> dict[str, Any]:
    with urllib.request.urlopen(f"{door.root}/status") as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def test_status_shows_nodes_replicas_and_what_they_cost(shown: Shown, door: Gateway) -> None:
    shown.node("n1", replica("r1"), replica("r2", "starting", why="loads"), gpus=2)
    shown.node("n2", replica("r3", "failed", why="no memory"), price_per_hour=0.9)
    shown.node("n3", replica("r4"), price_per_hour=None, device="of another world")
    shown.node("n4", price_per_hour=2.0)
    found = status(door)
    fleet = found["fleet"]
    assert (fleet["ready"], fleet["cost_per_hour"], fleet["unpriced"], fleet["gpus"]) == (2, "0.44", 1, 3)
    assert (fleet["min"], fleet["max"], fleet["max_price_per_hour"]) == (2, 6, "3")
    assert [node["name"] for node in fleet["nodes"]] == ["n1", "n2", "n3", "n4"]
    assert fleet["nodes"][0]["replicas"][0]["kv_blocks"] == {"used": 120, "total": 625}
    assert [(one["name"], one["ready"], one["why_down"]) for one in found["replicas"]] == [
        ("n1/r1", True, None),
        ("n1/r2", False, "loads"),
        ("n2/r3", False, "no memory"),
        ("n3/r4", True, None),
    ]


def test_status_shows_the_room_that_the_recipes_services_give(shown: Shown, door: Gateway) -> None:
    version = {"version": 1, "shares": [{"device": "rtx4090", "gpus": 1, "services": 3}]}
    shown.board.put("spec", {**shown.board.read("spec")["spec"], "versions": [version]})
    shown.node("n1", replica("r1", gpus=[0], of=3), replica("r2", gpus=[0], of=3), gpus=2, room=None)
    shown.node("n2", replica("r3", gpus=[0], of=3), room=2)
    fleet = status(door)["fleet"]
    assert [node["room"] for node in fleet["nodes"]] == [6, 2]
    assert fleet["cost_per_hour"] == "0.88", "a node's price counts once"


def test_tokens_a_second_are_what_the_gateway_counted(shown: Shown, door: Gateway) -> None:
    shown.node("n1", replica("r1", tokens=10**9), replica("r2"))
    shown.tick()
    shown.meter.answer("r1", tokens_out=500)
    shown.tick()
    fleet = status(door)["fleet"]
    rates = {one["name"]: one["tokens_per_s"] for one in fleet["nodes"][0]["replicas"]}
    assert rates["r2"] == 0
    assert rates["r1"] > 0
    assert fleet["tokens_per_s"] == rates["r1"]


def test_the_newest_events_come_first_and_torn_lines_are_left_out(shown: Shown, door: Gateway, tmp_path: Path) -> None:
    for number in range(60):
        shown.happened("scaled", f"event {number}", node="n1")
    with (tmp_path / "parrot" / "events.jsonl").open("a") as stream:
        stream.write('{"time": 1, "ki')
    events = status(door)["fleet"]["events"]
    assert [event["text"] for event in events[:2]] == ["event 59", "event 58"]
    assert len(events) <= 40


def test_the_ledgers_head_is_given_out(shown: Shown, door: Gateway) -> None:
    head = status(door)["fleet"]["ledger"]
    assert Head(head["number"], head["hash"]) == shown.meter.head


def test_while_the_board_cannot_be_reached_the_last_state_stays_and_says_so(
    shown: Shown, door: Gateway, tmp_path: Path
) -> None:
    shown.node("n1", replica("r1"))
    assert status(door)["fleet"]["reached"]
    (tmp_path / "parrot" / "board" / "nodes" / "n1.json").write_text("torn")
    time.sleep(0.7)  # a status is kept for half a second
    fleet = status(door)["fleet"]
    assert not fleet["reached"]
    assert [node["name"] for node in fleet["nodes"]] == ["n1"]


def test_metrics_of_replicas_and_their_engines_name_node_and_replica(shown: Shown, door: Gateway) -> None:
    shown.node("n1", replica("r1"))
    shown.node("n2", replica("r2", "down"))
    with urllib.request.urlopen(f"{door.root}/metrics") as answer:
        families = {one.name: one for one in text_string_to_metric_families(answer.read().decode())}
    ready = {tuple(sorted(one.labels.items())): one.value for one in families["scalellm_replica_ready"].samples}
    assert ready == {(("node", "n1"), ("replica", "r1")): 1, (("node", "n2"), ("replica", "r2")): 0}
    (first, _second) = families["nv_trt_llm_kv_cache_block_metrics"].samples
    assert first.labels["node"] == "n1"
    assert first.labels["kv_cache_block_type"] == "used"
    assert [one.value for one in families["scalellm_replica_tokens"].samples] == [9000, 9000]
    assert "scalellm_gateway_running" in families


@pytest.mark.parametrize(
    "nonsense", [{"price_per_hour": "NaN"}, {"gpus": None}, {"replicas": "x"}, {"replicas": [{"name": "r1"}]}]
)
def test_a_node_that_talks_nonsense_is_not_shown_and_harms_nobody(
    shown: Shown, door: Gateway, nonsense: dict[str, Any]
) -> None:
    shown.node("n0", **{"price_per_hour": 1, **nonsense})
    shown.node("n1", replica("r1"), replica("r2", figures={"tokens": "3\nevil 1", "metrics": "evil 1\n" * 10**5}))
    with urllib.request.urlopen(f"{door.root}/metrics") as answer:
        text = answer.read().decode()
    assert 'scalellm_replica_ready{node="n1",replica="r1"} 1.0' in text
    assert "evil" not in text
    assert [node["name"] for node in status(door)["fleet"]["nodes"]] == ["n1"]
