"""Dynamo's router in this process: for each lane, the workers that take requests and the way to them.

It chooses the least loaded worker, and continues a request on another one when its worker is lost or silent. This file
alone holds Dynamo's objects on the gateway's side.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import replace
from typing import Any, Self

from toolchain.fleet import wire
from toolchain.fleet.front.traffic import Traffic
from toolchain.fleet.plane import MIGRATIONS, Plane
from toolchain.gateway.failures import UpstreamError

_LOOK_S = 0.1
"""Until a lane that the head has opened is known here."""
_END_S = 1.0
"""For Dynamo to end, after nothing runs any more."""


class Routes:
    """Use as ``async with``."""

    def __init__(self, plane: Plane, traffic: Traffic) -> None:
        self._plane, self._traffic = plane, traffic
        self._clients: dict[str, Any] = {}
        self._routed: dict[str, Any] = {}
        """Dynamo's engines by lane, from when its first worker has registered."""
        self._runtime: Any = None
        self._tasks: list[asyncio.Future[Any]] = []

    async def __aenter__(self) -> Self:
        self._runtime = self._plane.runtime()
        from dynamo.llm import EngineType, EntrypointArgs, RouterConfig, RouterMode, make_engine, run_input

        await self._look()
        arguments = EntrypointArgs(
            EngineType.Dynamic,
            http_host="127.0.0.1",
            http_port=0,
            router_config=RouterConfig(RouterMode.LeastLoaded),
            migration_limit=MIGRATIONS,
            chat_engine_factory=self._found,
        )
        engine = await make_engine(self._runtime, arguments)
        self._tasks = [
            asyncio.ensure_future(run_input(self._runtime, "http", engine, [])),
            asyncio.create_task(self._keep_looking()),
        ]
        return self

    async def __aexit__(self, *_: object) -> None:
        running, looking = self._tasks
        looking.cancel()
        self._runtime.shutdown()
        for task in (running, looking):
            with contextlib.suppress(Exception, asyncio.CancelledError):
                async with asyncio.timeout(_END_S):
                    await task

    def workers(self, lane: str) -> list[int]:
        """The instances that take requests just now: each has generated a token before it came."""
        client = self._clients.get(lane)
        return sorted(client.instance_ids()) if client is not None else []

    def ready(self, lane: str) -> bool:
        """Whether a request can go there."""
        return lane in self._routed and bool(self.workers(lane))

    async def items(self, lane: str, ask: wire.Ask) -> AsyncGenerator[wire.Item, None]:
        """The items of one answer, as Dynamo gives them. Raises UpstreamError where it gives up. Left early, it ends at
        the worker, too: Dynamo itself does not see that nobody reads.
        """
        from dynamo.runtime import Context

        context = Context()
        try:
            stream = await self._routed[lane].generate(wire.request(ask, lane), context)
            async for found in stream:
                if found.is_error():
                    raise UpstreamError("; ".join(found.comments() or ["Dynamo gives no reason"]))
                yield found.data() or {}
        except (UpstreamError, asyncio.CancelledError, GeneratorExit):
            raise
        except Exception as error:  # of Dynamo's own kinds
            raise UpstreamError(str(error) or type(error).__name__) from None
        finally:
            context.stop_generating()

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            with contextlib.suppress(Exception):  # discovery is away: once more
                await self._look()

    async def _look(self) -> None:
        for name in [name for name in self._traffic.course.lanes if name not in self._clients]:
            path = replace(self._plane, endpoint=name).path
            self._clients[name] = await self._runtime.endpoint(path).client()

    async def _found(self, _instance: Any, card: Any, routed: Any) -> Any:
        """Called by Dynamo when the first worker of a lane has come."""
        from dynamo.llm import PythonAsyncEngine

        self._routed[card.name()] = routed

        async def unused(_request: Any, context: Any = None) -> AsyncIterator[Any]:
            raise UpstreamError("ask the gateway")
            yield context

        return PythonAsyncEngine(unused, asyncio.get_running_loop())
