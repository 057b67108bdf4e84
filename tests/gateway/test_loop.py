"""The event loop under the doors."""

from __future__ import annotations

import asyncio

import pytest

from toolchain.gateway import loop


def test_what_tokens_pass_through_runs_on_uvloop_where_it_is_installed() -> None:
    uvloop = pytest.importorskip("uvloop")

    async def running() -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    assert isinstance(loop.run(running()), uvloop.Loop)


def test_it_runs_on_pythons_own_loop_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "uvloop", None)

    async def answer() -> int:
        return 7

    assert loop.run(answer()) == 7
