"""What a worker says of itself, in a file that its node's agent reads: its state, and figures of its engine.

On many hosts nobody but the worker reaches its Triton, so it is the worker that asks for the engine's metrics and
passes on the lines that tell of the engine; the same way on one machine. What is paid for is counted elsewhere, by the
gateway: see ``front.meter``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from toolchain.fleet.worker.worker import ENGINE_MODEL, Adapter
from toolchain.gateway.kv import blocks_of, drafts_of

_EVERY_S = 2.0
_PASSED_ON = re.compile(
    r"^(?:# (?:HELP|TYPE) )?(?P<family>nv_trt_llm_\w+|nv_gpu_\w+|nv_inference_(?:request_success|request_failure|"
    r"count|exec_count|pending_request_count))(?P<labels>\{[^}]*\})?[ ]",
)
"""Families of Triton's metrics that tell of the engine and its GPU
(https://github.com/triton-inference-server/server/blob/main/docs/user_guide/metrics.md, read 2026-11).
"""
MOST_CHARACTERS = 32 * 1024
"""Of metrics; what a board takes as one value is bounded (etcd: 1.5 MiB)."""


class Bulletin:
    """The file, written whole or not at all; no file where none was named."""

    def __init__(self, file: str, adapter: Adapter | None = None) -> None:
        self._file, self._adapter = file, adapter
        self._state: dict[str, Any] = {}
        self._metrics = ""
        self._told = ""

    def tell(self, state: str, why: str = "") -> None:
        """How the worker is."""
        self._state = {"state": state, "why": why, "pid": os.getpid()}
        self._write()

    async def keep(self) -> None:
        """Its figures, again and again until cancelled."""
        assert self._adapter is not None
        while True:
            self._metrics = of_engine(await self._adapter.triton.metrics())
            with contextlib.suppress(OSError):  # a full disk ends no answer
                self._write()
            await asyncio.sleep(_EVERY_S)

    def _write(self) -> None:
        if not self._file:
            return
        text = json.dumps({**self._state, "figures": self._figures()} if self._adapter else self._state)
        if text != self._told:  # not synced: it must be whole, not outlive a power cut, and answers wait meanwhile
            file = Path(self._file)
            temporary = file.with_name(f".{file.name}.tmp")
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(file)
        self._told = text

    def _figures(self) -> dict[str, Any]:
        adapter = self._adapter
        assert adapter is not None
        file = adapter.triton.upstream.status_file
        blocks, drafts = blocks_of(self._metrics, file), drafts_of(file)
        return {
            "running": adapter.running,
            "requests": adapter.requests,
            "tokens": adapter.tokens,
            "kv_blocks": asdict(blocks) if blocks else None,
            "drafts": asdict(drafts) if drafts else None,
            "metrics": self._metrics,
        }


def of_engine(text: str) -> str:
    """The lines of a Triton's metrics that tell of the engine; of models, the engine's own alone."""
    lines = []
    for line in text.splitlines():
        found = _PASSED_ON.match(line)
        if found is None:
            continue
        labels = found["labels"] or ""
        if "model=" not in labels or f'model="{ENGINE_MODEL}"' in labels:
            lines.append(line)
    kept = "\n".join(lines)
    return f"{kept}\n" if kept and len(kept) <= MOST_CHARACTERS else ""
