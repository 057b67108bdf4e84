"""Promises about what a gateway refuses to do before it binds a port."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import unused_ports
from toolchain.chat import ChatTemplate
from toolchain.errors import ArtifactError, EndpointError, RecipeError
from toolchain.gateway import keys
from toolchain.gateway.run import Listen, background, check
from toolchain.gateway.settings import Model, Settings, Upstream

SETTINGS = Settings(Model("m", 0, ChatTemplate(None)), (Upstream("http://127.0.0.1:1"),))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_an_address_for_others_needs_a_key_or_the_word_for_it(host: str, tmp_path: Path) -> None:
    guarded = replace(SETTINGS, keys=tmp_path / "keys.json")
    with pytest.raises(RecipeError, match="no API key") as caught:
        check(guarded, Listen(host=host))
    assert "gateway keys add" in caught.value.hint
    check(guarded, Listen(host=host, insecure_open=True))
    keys.add(tmp_path / "keys.json", "alice")
    check(guarded, Listen(host=host))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_this_machine_needs_none(host: str) -> None:
    check(SETTINGS, Listen(host=host))


def test_half_of_tls_and_a_file_that_is_no_certificate_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="both"):
        check(SETTINGS, Listen(cert=tmp_path / "cert.pem"))
    (tmp_path / "cert.pem").write_text("no certificate")
    with pytest.raises(ArtifactError, match="not a certificate"):
        check(SETTINGS, Listen(cert=tmp_path / "cert.pem", key=tmp_path / "cert.pem"))


def test_a_taken_port_is_told() -> None:
    port, predict_port = unused_ports(2)
    listen = Listen(port=port, predict_port=predict_port)
    told = pytest.raises(EndpointError, match=f"cannot listen on 127.0.0.1:{port}")
    with background(SETTINGS, listen), told, background(SETTINGS, listen):
        pass
