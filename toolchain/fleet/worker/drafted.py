"""A replica with a draft engine beside its engine: what ``tensorrt_llm_bls`` does there, step by step, in the worker.

The stepping is that model's own code (``speculation.py``), which waits for each step, so that a request has a thread.
"""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from toolchain.fleet import wire
from toolchain.fleet.worker.dialect import SHARED, engine_names
from toolchain.gateway.failures import UpstreamError, of_triton
from toolchain.gateway.shared import load_together
from toolchain.gateway.triton import Triton

_STATUS = {"INVALID_ARG": 400, "UNAVAILABLE": 503}


class Drafted:
    """One replica's pair of engines."""

    def __init__(self, triton: Triton, parameters: Mapping[str, Any]) -> None:
        """``parameters``: of the replica's ``repository.Repository``, which has a draft model."""
        self._shared = load_together(SHARED, ("tensors", "wiring", "speculation", "failed", "http_engine"))
        where = urlsplit(triton.upstream.http_url)
        address, engine = (where.hostname or "", where.port or 80), self._shared["http_engine"].HttpEngine
        draft = engine(str(parameters["tensorrt_llm_draft_model_name"]), address)
        self._triton, self._engine = triton, engine(triton.model, address)
        longest, self._tokens = int(parameters["draft_max_seq_len"]), int(parameters["num_draft_tokens"])
        self._drafts = self._shared["speculation"].Drafts(draft, self._tokens, longest)
        self._names = engine_names(parameters)

    async def open(self, ask: wire.Ask) -> DraftedFlow:
        """Waits for the first tokens. Raises ApiError, BusyError or UpstreamError."""
        tensors = _arrays(wire.inputs(ask))
        tokens = min(ask.draft_tokens, self._tokens)
        speculation = self._shared["speculation"].Speculation(self._engine, self._drafts, tokens, self._names.inputs)
        wanted = self._shared["wiring"].wanted_outputs(tensors, self._names)
        flow = DraftedFlow(self._triton, speculation, tensors, wanted, self._shared["failed"])
        try:
            await flow.begin()
        except BaseException:
            flow.close()
            raise
        return flow


class DraftedFlow:
    """One answer: events as Triton gives them."""

    def __init__(self, triton: Triton, speculation: Any, tensors: Any, wanted: list[str], failed: Any) -> None:
        self._triton, self._speculation, self._failed = triton, speculation, failed
        self._id = f"drafted-{uuid.uuid4()}"
        self._queue: asyncio.Queue[Any] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._first: Any = None
        self._over = False
        self._thread = threading.Thread(target=self._run, args=(tensors, wanted), name=self._id, daemon=True)

    async def begin(self) -> None:
        self._triton.in_flight += 1
        self._thread.start()
        self._first = await self._next()

    async def __aiter__(self) -> AsyncIterator[dict[str, Any]]:
        event = self._first
        while event is not None:
            yield event
            event = await self._next()

    def close(self) -> None:
        """Cancels what is still to come."""
        if self._over:
            return
        self._over = True
        self._triton.in_flight -= 1
        if self._thread.is_alive():
            threading.Thread(target=self._stop, name=f"{self._id}-stop", daemon=True).start()

    async def _next(self) -> Any:
        event = await self._queue.get()
        if isinstance(event, BaseException):
            raise event
        if event is not None:
            self._triton.last_good_s = time.monotonic()
        return event

    def _stop(self) -> None:
        try:
            self._speculation.stop(self._id)
        except self._failed.FailedError:  # its Triton is gone, and the request with it
            return

    def _run(self, tensors: Any, wanted: list[str]) -> None:
        """In a thread of its own."""
        try:
            for outputs in self._speculation.generate(self._id, tensors, wanted):
                self._tell({name: array.reshape(-1).tolist() for name, array in outputs.items()})
            self._tell(None)
        except self._failed.CutError as error:
            self._tell(UpstreamError(error.message))
        except self._failed.FailedError as error:
            self._tell(of_triton(_STATUS.get(error.code, 500), error.message))
        except Exception as error:
            self._tell(UpstreamError(f"{type(error).__name__}: {error}"))

    def _tell(self, event: Any) -> None:
        with suppress(RuntimeError):  # the loop has ended, and whoever listened with it
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)


def _arrays(inputs: Mapping[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """JSON's flat lists as the tensors that they are for the model: [1, n], tables of words [1, 2, n]."""
    arrays = {name: np.array([wire.listed(value)]) for name, value in inputs.items()}
    tables = {name: array.reshape(1, 2, -1) for name, array in arrays.items() if name.endswith("_words_list")}
    return arrays | tables
