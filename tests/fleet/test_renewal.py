"""A node's certificate before it runs out: renewed at the door of a real head, for nobody but the node itself."""

from __future__ import annotations

import datetime
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from tests.conftest import unused_ports
from tests.fleet.endpoint import need_servers
from tests.fleet.test_network import ask
from toolchain.errors import EndpointError, RejectedError
from toolchain.fleet.hosts.door import opened
from toolchain.fleet.hosts.joining import Membership, join, renew
from toolchain.fleet.hosts.network import Addresses, Guests, serving
from toolchain.fleet.hosts.renewal import left
from toolchain.fleet.hosts.tokens import Token
from toolchain.fleet.trust import Authority, Identity, make_request
from toolchain.progress import Silent
from toolchain.stages.join import keep_certificate

DAY, YEAR = datetime.timedelta(days=1), datetime.timedelta(days=365)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guests]:
    need_servers()
    guests = Guests(tmp_path_factory.mktemp("network"), "parrot", Addresses("127.0.0.1", *unused_ports(4)))
    with serving(guests, Silent()):
        yield guests


@pytest.fixture
def guests(served: Guests) -> Iterator[Guests]:
    """With a door of its own, which counts its tries anew."""
    with opened(served, Silent()):
        yield served
    served.authority.lasts = YEAR


def joined(guests: Guests, folder: Path, lasts: datetime.timedelta) -> tuple[Membership, Token]:
    """A node whose certificate is good for so long; those that are given afterwards last a year."""
    guests.authority.lasts = lasts
    token = guests.token(lives_s=60)
    found = join(token, folder.name, folder)
    guests.authority.lasts = YEAR
    return found, token


def serial(identity: Identity) -> int:
    return x509.load_pem_x509_certificate(identity.certificate.read_bytes()).serial_number


def test_to_join_again_renews_a_certificate_that_soon_runs_out(guests: Guests, tmp_path: Path) -> None:
    node, token = joined(guests, tmp_path / "soon", 10 * DAY)
    before, key = serial(node.identity), node.identity.key.read_bytes()
    assert left(node.identity) < 10 * DAY
    assert join(token, "whatever", node.folder) == node, "its place and its password are the same"
    assert serial(node.identity) != before
    assert left(node.identity) > 364 * DAY
    assert node.identity.key.read_bytes() == key
    assert node.board().read("spec") == {}, "etcd takes it"
    again = serial(node.identity)
    assert join(token, "whatever", node.folder) == node
    assert serial(node.identity) == again, "one that is good for long stays"


def test_a_running_node_is_reached_by_its_new_certificate_after_the_old_one_has_run_out(
    guests: Guests, tmp_path: Path
) -> None:
    node, token = joined(guests, tmp_path / "running", datetime.timedelta(seconds=5))
    ends = time.monotonic() + left(node.identity).total_seconds()
    context, old = (node.identity.client_context(nameless=True) for _ in range(2))
    until = threading.Event()
    keeping = threading.Thread(target=keep_certificate, args=(node, token.door, context, until, Silent(), 0.05))
    keeping.start()
    while left(node.identity) < DAY:
        time.sleep(0.05)
    until.set()
    keeping.join(10)
    time.sleep(max(0.0, ends - time.monotonic()) + 0.5)
    assert node.board(context).read("spec") == {}
    with pytest.raises(EndpointError, match="cannot be reached"):
        node.board(old).read("spec")


def test_one_that_has_run_out_is_not_renewed_and_says_what_to_type(guests: Guests, tmp_path: Path) -> None:
    node, token = joined(guests, tmp_path / "late", datetime.timedelta(seconds=-60))
    with pytest.raises(RejectedError, match="has run out") as found:
        join(token, "late", node.folder)
    assert "scalellm deploy revoke parrot late" in found.value.hint
    assert "scalellm deploy token parrot" in found.value.hint


def test_a_node_that_was_put_out_gets_none_even_when_its_name_is_let_in_again(guests: Guests, tmp_path: Path) -> None:
    gone, token = joined(guests, tmp_path / "gone", 10 * DAY)
    guests.put_out("gone")
    with pytest.raises(RejectedError, match="gone is no node of this endpoint, or no more"):
        join(token, "gone", gone.folder)
    joined(guests, tmp_path / "other" / "gone", 10 * DAY)
    with pytest.raises(RejectedError, match="no node"):
        renew(gone, token.door)


def test_nobody_gets_another_ones_certificate(guests: Guests, tmp_path: Path) -> None:
    node, token = joined(guests, tmp_path / "mine", 10 * DAY)
    thief, _ = joined(guests, tmp_path / "thief", 10 * DAY)
    stranger = Identity(tmp_path / "stranger")
    elsewhere = Authority(tmp_path / "elsewhere", "parrot")
    stranger.write(elsewhere.pem, elsewhere.sign(make_request(stranger, "mine"), "mine"))

    def asked(shown: Identity, key: Identity, **changes: str) -> dict[str, Any]:
        papers = {
            "certificate": shown.certificate.read_text(),
            "request": make_request(key, "mine", again=True).decode(),
        }
        return {"node": "mine", "password": node.password, **papers, **changes}

    mine = node.identity
    bodies = [
        ("another one's", asked(thief.identity, thief.identity)),
        ("another one's", asked(mine, thief.identity)),
        ("no node of", asked(mine, mine, password=thief.password)),
        ("no node of", asked(mine, mine, node="nobody", password="")),
        ("not one of this endpoint", asked(stranger, stranger)),
        ("not one of this endpoint", asked(mine, mine, certificate="x")),
        ("needs node, password", {"node": "mine"}),
    ]
    for said, body in bodies:
        status, raw = ask(token.door, mine.client_context(), "/renew", body)
        assert (status, said in json.loads(raw)["message"]) == (403, True), (said, raw)
    status, _ = ask(token.door, mine.client_context(), "/renew", asked(mine, mine))
    assert status == 200, "its own it gets"


def test_a_head_that_is_away_stops_no_node_whose_certificate_is_still_good(guests: Guests, tmp_path: Path) -> None:
    node, token = joined(guests, tmp_path / "alone", 10 * DAY)
    away = replace(token, door=f"https://127.0.0.1:{unused_ports(1)[0]}")
    assert join(away, "alone", node.folder) == node
    late, token = joined(guests, tmp_path / "too-late", datetime.timedelta(seconds=-60))
    with pytest.raises(EndpointError, match="cannot be reached"):
        join(replace(token, door=away.door), "too-late", late.folder)
