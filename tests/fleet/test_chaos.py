"""An endpoint over three hosts, one of them behind a NAT: clients see one service, whatever is lost of it.

The hosts are network namespaces of this machine; the Tritons, the workers, etcd, NATS and their TLS are real. Every
engine computes in float32 alone, so that a greedy answer does not depend on what else is in its batch.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fleet import hosts
from tests.fleet.chaos import REPLICAS, ROOM, STREAMS, Fleet, Outcome, Stream, fleet
from tests.fleet.endpoint import until
from tests.fleet.head_process import ENDPOINT, PORTS
from tests.fleet.hosts import HEAD_ADDRESS
from toolchain.measuring.conformance_doors import Json
from toolchain.stages.conformance import Beside, conformance

pytestmark = pytest.mark.timeout(200)
TOKENS = 400
LATE = 8
"""Short answers that are asked for in the second after a strike."""


@pytest.fixture(scope="module")
def running(repository: Path, parrot: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    pytest.importorskip("dynamo._core", reason="the extra fleet is not installed")
    hosts.require()
    with fleet(tmp_path_factory.mktemp("chaos"), repository, parrot) as found:
        yield found


@pytest.fixture(scope="module")
def undisturbed(running: Fleet) -> Stream:
    found = running.stream(TOKENS)
    assert found.error == ""
    assert found.tokens == TOKENS
    return found


@pytest.fixture(scope="module")
def short(running: Fleet) -> Stream:
    return running.stream(40)


def test_an_endpoint_over_hosts_answers_as_one_service_does(running: Fleet) -> None:
    assert len(running.seen()) == REPLICAS
    completion = Json("OpenAI", f"{running.url}/completions", ENDPOINT, None)
    predict = Json("/predict", f"http://{HEAD_ADDRESS}:{PORTS['predict']}/predict", ENDPOINT, None)
    beside = Beside(chat=Json("chat", f"{running.url}/chat/completions", ENDPOINT, None), predict=predict)
    found = list(conformance([completion, predict], beside))
    assert found
    assert [one for one in found if not one.passed] == []


def test_nothing_listens_on_a_node(running: Fleet) -> None:
    assert {name: running.hosts[name].listening() for name in ("a", "b", "c")} == {"a": [], "b": [], "c": []}
    assert sorted(running.hosts["head"].listening()) == sorted(f"{HEAD_ADDRESS}:{port}" for port in PORTS.values())


def check(outcome: Outcome, undisturbed: Stream, short: Stream) -> None:
    assert outcome.at_work, "the streams were too short for this machine"
    assert outcome.failed == []
    assert [one.answer for one in outcome.streams[:STREAMS]] == [undisturbed.answer] * STREAMS
    assert [one.answer for one in outcome.streams[STREAMS:]] == [short.answer] * LATE


STRIKES: dict[str, Callable[[Fleet], object]] = {
    "a stub": lambda fleet: fleet.kill_stub("a"),
    "a Triton": lambda fleet: fleet.kill_triton("b"),
    "a worker behind the NAT": lambda fleet: fleet.kill_worker("c"),
}


@pytest.mark.parametrize("strike", STRIKES.values(), ids=STRIKES)
def test_no_client_sees_that_a_process_is_lost(
    running: Fleet, undisturbed: Stream, short: Stream, strike: Callable[[Fleet], object]
) -> None:
    """It comes back by itself."""
    outcome = running.under_streams(lambda: strike(running), TOKENS, late=LATE)
    check(outcome, undisturbed, short)


def test_no_client_sees_that_a_host_is_lost(running: Fleet, undisturbed: Stream, short: Stream) -> None:
    """It loses its power; when it has it again, it joins as the node that it was."""
    lost = running.hosts["b"]
    outcome = running.under_streams(lost.lose, TOKENS, back=False, late=LATE)
    check(outcome, undisturbed, short)
    lost.mend()
    running.join("b")
    until(running.whole, 90)


def test_no_client_sees_a_black_hole(running: Fleet, undisturbed: Stream, short: Stream) -> None:
    """A host whose packets vanish for some seconds, while all of its processes go on."""
    cut = running.hosts["c"]
    outcome = running.under_streams(cut.cut, TOKENS, back=False, late=LATE)
    check(outcome, undisturbed, short)
    cut.mend()
    until(running.whole, 90)


@pytest.mark.parametrize("server", ["bin/etcd", "nats-server"])
def test_streams_go_on_while_discovery_starts_again(
    running: Fleet, undisturbed: Stream, short: Stream, server: str
) -> None:
    """What is asked meanwhile is answered when it is back."""
    outcome = running.under_streams(lambda: running.kill("head", server), TOKENS, back=False, late=LATE)
    check(outcome, undisturbed, short)
    until(running.whole, 90)


def test_the_front_takes_its_streams_with_it_and_the_nodes_find_the_next_one(
    running: Fleet, short: Stream, undisturbed: Stream
) -> None:
    """A client sees its connection end, and may ask again; the nodes need no new token."""
    assert running.head is not None
    pid = running.process("head", "tests.fleet.head_process")
    outcome = running.under_streams(lambda: os.kill(pid, signal.SIGKILL), TOKENS, back=False)
    assert 0 < len(outcome.failed) <= outcome.at_work, "one may end between the count and the kill"
    assert {one.answer for one in outcome.streams if not one.error} <= {undisturbed.answer}
    running.head.kill()
    running.start_head()
    until(running.whole, 90)
    assert running.stream(40).answer == short.answer


def test_a_node_that_is_asked_to_end_drains(running: Fleet, undisturbed: Stream) -> None:
    def ask() -> None:
        os.kill(running.process("c", "toolchain.cli"), signal.SIGTERM)

    outcome = running.under_streams(ask, TOKENS, back=False)
    assert outcome.at_work
    assert [one.answer for one in outcome.streams] == [undisturbed.answer] * STREAMS
    assert running.nodes["c"].wait(30) == 0
    assert len(running.seen()) == REPLICAS - ROOM["c"]
