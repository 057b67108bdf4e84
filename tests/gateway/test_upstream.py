"""What the gateway makes of a Triton that it cannot reach."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from toolchain.gateway.failures import SilentError, UnreachedError
from toolchain.gateway.settings import Timeouts, Upstream
from toolchain.gateway.triton import Triton, make_session


@pytest.fixture
def crowded() -> Iterator[int]:
    """The port of a server whose queue of connections is full, so that the kernel lets every further one wait."""
    with ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(3):
            one = stack.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(server.getsockname())
        yield server.getsockname()[1]


def test_a_connection_that_takes_too_long_is_another_failure_than_silence(crowded: int) -> None:
    """Nothing was asked yet, so the request may be asked again; one that waited for its token is not."""

    async def ask() -> None:
        timeouts = Timeouts(connect_s=0.3, first_token_s=30)
        async with make_session(timeouts) as session:
            await Triton(Upstream(f"http://127.0.0.1:{crowded}"), "model", session, timeouts).open({})

    with pytest.raises(UnreachedError, match=r"no connection within 0\.3 s") as caught:
        asyncio.run(ask())
    assert not isinstance(caught.value, SilentError)
