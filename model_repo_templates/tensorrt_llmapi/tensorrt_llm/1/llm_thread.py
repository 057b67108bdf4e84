"""TensorRT-LLM's ``LLM`` and its event loop, in a thread: requests in, tokens out. It knows nothing of Triton.

``generate_async`` and its results belong to one event loop, so everything that touches them runs there; other threads
only leave messages. The runtime computes in worker processes of its own, which it starts through MPI.

What is used of TensorRT-LLM (1.0 to 1.2): LLM(**arguments), LLM.generate_async(ids, sampling_params=, streaming=),
LLM.shutdown(), SamplingParams(**options), llmapi.llm_utils.update_llm_args_with_extra_dict, and of a result
``async for``, abort(), finished, outputs[0].token_ids, .finish_reason and .logprobs (tensorrt_llm/llmapi/llm.py
@00966934, tensorrt_llm/executor/result.py @005bc848, and NVIDIA's llmapi model.py @044a90d2).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np

_STOP_S = 60.0
"""How long the runtime may take to leave. Its worker processes free a GPU's memory in that time."""

_OF_ANOTHER_MPI_JOB = ("OMPI_COMM_WORLD_", "OMPI_MCA_orte_", "OMPI_UNIVERSE_SIZE", "ORTE_", "PMIX_", "PMI_")
_KEPT = ("PMIX_MCA_",)


class LlmThread:
    """A running ``LLM``. ``dead`` is None, or in words why it is no more."""

    def __init__(
        self,
        arguments: dict[str, Any],
        *,
        on_events: Callable[[list[tuple[Any, ...]], dict[str, Any]], None],
        on_death: Callable[[str], None],
    ) -> None:
        """Start it and wait until it has generated a token. RuntimeError, with its own words, when it fails to."""
        forget_other_mpi_jobs()
        self.dead: str | None = None
        self._on_events, self._on_death = on_events, on_death
        self._running: dict[int, asyncio.Task[None]] = {}
        self._ready: Future[asyncio.AbstractEventLoop] = Future()
        self._thread = threading.Thread(target=self._live, args=(arguments,), name="llm", daemon=True)
        self._thread.start()
        self._loop = self._ready.result()

    @property
    def pid(self) -> int:
        return os.getpid()

    def send(self, *message: Any) -> None:
        """("add", key, ids as bytes of int64, options) or ("cancel", key); never waits. Lost once it is closed."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._take, *message)

    def close(self) -> None:
        """End what runs, give the GPU back."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join(_STOP_S)

    def _live(self, arguments: dict[str, Any]) -> None:
        try:
            asyncio.run(self._serve(arguments))
        except Exception as error:
            words = f"{type(error).__name__}: {error}"
            if not self._ready.done():
                self._ready.set_exception(RuntimeError(f"the engine did not start: {words} (told: {arguments})"))
            else:
                self._die(words)

    async def _serve(self, arguments: dict[str, Any]) -> None:
        """From the first weight to the last answer. The constructor blocks for minutes, so it gets another thread."""
        from tensorrt_llm import LLM, SamplingParams
        from tensorrt_llm.llmapi.llm_utils import update_llm_args_with_extra_dict

        self._params = SamplingParams
        self._closing = asyncio.Event()
        loop = asyncio.get_running_loop()
        told = update_llm_args_with_extra_dict({}, arguments)  # nested dictionaries become the objects they mean
        self._llm = await loop.run_in_executor(None, lambda: LLM(**told))
        try:
            await self._warm_up()
            self._ready.set_result(loop)
            await self._closing.wait()
            for task in list(self._running.values()):
                task.cancel()
            await asyncio.gather(*self._running.values(), return_exceptions=True)
        finally:
            await loop.run_in_executor(None, self._llm.shutdown)

    async def _warm_up(self) -> None:
        """One token, so that a server that says it is ready has generated once."""
        params = self._params(max_tokens=1, end_id=-1, pad_id=0, ignore_eos=True, detokenize=False, top_k=1)
        async for _output in self._llm.generate_async([0], sampling_params=params, streaming=False):
            pass

    def _take(self, kind: str, key: int, *request: Any) -> None:
        if kind == "add":
            self._running[key] = asyncio.get_running_loop().create_task(self._generate(key, *request))
        elif task := self._running.get(key):
            task.cancel()

    async def _generate(self, key: int, ids: bytes, options: dict[str, Any]) -> None:
        """One sequence. A task that is cancelled aborts it in the runtime, too, and says nothing more."""
        result = None
        try:
            params = self._params(**options["sampling"], seed=options["rng_seed"])
            prompt = np.frombuffer(ids, dtype=np.int64).tolist()
            result = self._llm.generate_async(prompt, sampling_params=params, streaming=options["streaming"])
            await self._follow(key, result, options)
        except asyncio.CancelledError:
            if result is not None:
                result.abort()
            self._tell(key, None)
        except Exception as error:  # Whatever it is, the client must not wait for ever.
            self._tell(key, ("error", f"{type(error).__name__}: {error}"))
            self._look_after_death(error)

    async def _follow(self, key: int, result: Any, options: dict[str, Any]) -> None:
        seen = 0
        async for output in result:
            answer = output.outputs[0]
            ids, log_probs = list(answer.token_ids[seen:]), _log_probs(answer, seen, options)
            seen += len(ids)
            if not output.finished:
                self._on_events([(key, 0, ids, log_probs, None, "")], self._status())
                continue
            if answer.finish_reason in ("timeout", "cancelled"):
                self._tell(key, ("error", f"the runtime ended this request: {answer.finish_reason}"))
                return
            while ids and ids[-1] in options["stop_ids"]:  # The end id is not part of the answer.
                del ids[-1]
            log_probs = log_probs[: len(ids)] if log_probs is not None else None
            finish = "length" if answer.finish_reason == "length" else "stop"
            self._tell(key, (finish, ""), ids, log_probs)
            return
        self._tell(key, ("error", "the runtime ended this request without a word"))

    def _tell(
        self, key: int, end: tuple[str, str] | None, ids: list[int] | None = None, log_probs: list[float] | None = None
    ) -> None:
        """The last event of a sequence; without ``end`` nobody waits for one, and only the status has changed."""
        self._running.pop(key, None)
        self._on_events([(key, 0, ids or [], log_probs, *end)] if end else [], self._status())

    def _status(self) -> dict[str, Any]:
        return {"running": len(self._running), "waiting": 0}

    def _look_after_death(self, error: Exception) -> None:
        """An error of one request, or the end? ``trtllm-serve`` asks the same (tensorrt_llm/serve/openai_server.py)."""
        alive = getattr(self._llm, "_check_health", lambda: True)
        if not alive():
            self._die(f"{type(error).__name__}: {error}")

    def _die(self, words: str) -> None:
        if self.dead is None:
            self.dead = f"the engine died ({words}); the server must be restarted"
            self._on_death(self.dead)


def forget_other_mpi_jobs() -> None:
    """Variables of the MPI job that Triton itself was started by, if it was, would confuse the runtime's own job.

    Which ones: the head of NVIDIA's llmapi model.py @044a90d2.
    """
    for name in list(os.environ):
        if name.startswith(_OF_ANOTHER_MPI_JOB) and not name.startswith(_KEPT):
            del os.environ[name]


def _log_probs(answer: Any, start: int, options: dict[str, Any]) -> list[float] | None:
    """Of the ids from ``start`` on: each entry maps ids to objects with ``logprob``; of old, it was the number."""
    if not options["sampling"].get("logprobs"):
        return None
    found = []
    for token, entry in zip(answer.token_ids[start:], answer.logprobs[start:], strict=False):
        if isinstance(entry, dict):
            entry = (entry.get(token) or next(iter(entry.values()))).logprob
        found.append(float(entry))
    return found
