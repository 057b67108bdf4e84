"""Certificates and tokens: what OpenSSL makes of them, what is refused, what is kept where."""

from __future__ import annotations

import json
import socket
import ssl
import stat
import threading
import time
from pathlib import Path

import pytest

from toolchain.errors import RejectedError
from toolchain.fleet.hosts.tokens import Token, Tokens, seconds_of
from toolchain.fleet.trust import HEAD, SERVER, Authority, Identity, fingerprint, make_request

cryptography = pytest.importorskip("cryptography", reason="the extra fleet is not installed")


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority", "my-llama")


def node_of(authority: Authority, folder: Path, name: str = "n1") -> Identity:
    identity = Identity(folder)
    identity.write(authority.pem, authority.sign(make_request(identity, name), name))
    return identity


def shake_hands(server: Identity, client: Identity, host: str = "127.0.0.1") -> str:
    """The client's name as the server sees it. Raises ssl.SSLError of the client."""
    offered = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    offered.load_cert_chain(server.certificate, server.key)
    offered.load_verify_locations(server.authority)
    offered.verify_mode = ssl.CERT_REQUIRED
    seen: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            one, _ = listening.accept()
            try:
                with offered.wrap_socket(one, server_side=True) as connection:
                    subject = connection.getpeercert()["subject"]  # type: ignore[index]
                    seen.append(dict(field[0] for field in subject)["commonName"])  # type: ignore[misc, index]
                    connection.sendall(b"x")
            except OSError as error:
                seen.append(f"refused: {error}")

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            context, raw = client.client_context(), socket.create_connection(listening.getsockname())
            with raw, context.wrap_socket(raw, server_hostname=host) as connection:
                connection.recv(1)
        finally:
            thread.join()
    return seen[0]


def test_a_node_is_known_by_its_name_and_knows_the_head(authority: Authority, tmp_path: Path) -> None:
    server = Identity(tmp_path / "server")
    authority.issue(server, SERVER, hosts=["127.0.0.1"])
    assert shake_hands(server, node_of(authority, tmp_path / "n1")) == "n1"


def test_a_node_does_not_talk_to_another_address_nor_to_another_authority(authority: Authority, tmp_path: Path) -> None:
    node, server = node_of(authority, tmp_path / "n1"), Identity(tmp_path / "server")
    authority.issue(server, SERVER, hosts=["10.0.0.1"])
    with pytest.raises(ssl.SSLCertVerificationError, match="IP address mismatch"):
        shake_hands(server, node)
    Authority(tmp_path / "other", "my-llama").issue(server, SERVER, hosts=["127.0.0.1"])
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(server, node)


def test_a_node_cannot_pose_as_the_head(authority: Authority, tmp_path: Path) -> None:
    one, two = node_of(authority, tmp_path / "n1"), node_of(authority, tmp_path / "n2", "n2")
    with pytest.raises(ssl.SSLCertVerificationError, match="unsuitable certificate purpose"):
        shake_hands(one, two, host="n1")
    for name in (HEAD, SERVER, "root", "n1.", "N1", "", "a" * 41, "../x"):
        with pytest.raises(RejectedError):
            authority.sign(make_request(Identity(tmp_path / "x"), "x"), name)


def test_only_the_key_of_a_request_counts(authority: Authority, tmp_path: Path) -> None:
    from cryptography import x509

    request = make_request(Identity(tmp_path / "sly"), HEAD)  # asks to be the head
    given = authority.sign(request, "n1")
    named, nameless = (x509.load_pem_x509_certificate(one) for one in (given.named, given.nameless))
    assert (named.subject.rfc4514_string(), nameless.subject.rfc4514_string()) == ("CN=n1", "")
    for wrong in (b"", b"x" * 9000, request[:-100], authority.pem):
        with pytest.raises(RejectedError):
            authority.sign(wrong, "n1")


def test_keys_are_private_and_the_authority_stays(authority: Authority, tmp_path: Path) -> None:
    node_of(authority, tmp_path / "n1")
    for key in (tmp_path / "authority" / "ca-key.pem", tmp_path / "n1" / "key.pem"):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert Authority(tmp_path / "authority", "my-llama").fingerprint == authority.fingerprint
    assert fingerprint(authority.pem.decode()) == authority.fingerprint


def test_a_token_is_good_for_its_uses_and_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = Tokens(tmp_path / "tokens.json")
    name, secret = tokens.add(lives_s=60, uses=2)
    assert secret not in (tmp_path / "tokens.json").read_text()
    with pytest.raises(ZeroDivisionError), tokens.spending(name, secret):
        raise ZeroDivisionError  # what it was spent on failed: it is not spent
    for _ in range(2):
        with tokens.spending(name, secret):
            pass
    late = tokens.add(lives_s=60)
    now = time.time()
    for wrong in ((name, secret), (late[0], secret), ("nobody", secret), (late[0], "\ud800")):
        with pytest.raises(RejectedError, match="not good"), tokens.spending(*wrong):
            pass
    monkeypatch.setattr(time, "time", lambda: now + 61)
    with pytest.raises(RejectedError, match="not good"), tokens.spending(*late):
        pass
    assert json.loads((tmp_path / "tokens.json").read_text())  # who fails writes nothing
    tokens.add(lives_s=5)
    assert len(json.loads((tmp_path / "tokens.json").read_text())) == 1


def test_a_token_survives_paper_and_no_other_text_is_one() -> None:
    token = Token("https://10.0.0.1:7600", "my-llama", "ab" * 32, "0f", "secret")
    assert Token.read(f"  {token}\n") == token
    for wrong in ("", "scalellm-join-", "scalellm-join-x", str(token)[:-8], str(token)[1:], "scalellm-join-WzFd"):
        with pytest.raises(RejectedError):
            Token.read(wrong)


def test_times_are_read_as_people_write_them() -> None:
    assert [seconds_of(one) for one in ("90s", "30m", "1h", "2d")] == [90, 1800, 3600, 172800]
    for wrong in ("", "1", "h", "0h", "-1h", "31d", "1.5h", "1w"):
        with pytest.raises(RejectedError):
            seconds_of(wrong)
