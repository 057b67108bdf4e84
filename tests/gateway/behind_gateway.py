"""A parrot behind real Tritons, and gateways in front of them. For the tests of the gateway."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.conftest import unused_ports
from toolchain.chat import ChatTemplate
from toolchain.gateway.logs import Log
from toolchain.gateway.run import Listen, background
from toolchain.gateway.settings import Limits, Model, Settings, Timeouts, Upstream
from toolchain.gateway.tokens import load_tokenizer

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
"""What the parrot knows are sentences; so a conversation is its texts."""
QUICK = Timeouts(connect_s=2, body_s=2, first_token_s=20, between_tokens_s=5, request_s=60, write_s=2, patience_s=15)


class Gateway:
    """A running gateway: its addresses and its log."""

    def __init__(self, listen: Listen, settings: Settings, stream: io.StringIO) -> None:
        self.listen, self.settings, self._stream = listen, settings, stream
        self.url = listen.urls["OpenAI"]
        self.root = self.url.removesuffix("/v1")
        self.predict_url = listen.urls["/predict"]

    @property
    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._stream.getvalue().splitlines()]


def settings_for(tokenizer: Path, *http_ports: int, **changes: Any) -> Settings:
    model = Model(
        name="parrot",
        created=1_700_000_000,
        template=ChatTemplate(TEMPLATE, {"bos_token": "<s>"}),
        tokenizer=load_tokenizer(tokenizer),
        max_seq_len=6000,
        fingerprint="fp_test",
    )
    upstreams = tuple(Upstream(f"http://127.0.0.1:{port}") for port in http_ports)
    return replace(Settings(model, upstreams, timeouts=QUICK, limits=Limits()), **changes)


@contextmanager
def gateway(settings: Settings, **listen: Any) -> Iterator[Gateway]:
    port, predict_port = unused_ports(2)
    stream = io.StringIO()
    where = Listen(**{"port": port, "predict_port": predict_port, **listen})
    with background(settings, where, log=Log(stream)) as bound:
        yield Gateway(bound, settings, stream)
