"""Which prompts may be read at the same time, where a cache is used again for prompts that begin alike.

OpenVINO GenAI 2026.4.1 gives a prompt the blocks of an earlier one that began alike, also one that is only partly
filled, and does not copy it when two prompts get the same one: both write into it, and an answer may follow the other's
text. It also remembers the last block of a part of a prompt as complete, though its last places are still empty; a
request that is cancelled just then leaves it to others. Both measured, 2026-11-23; in its block_manager.hpp
``allocate_tokens`` does not copy, and ``allocate`` names a block by what it will hold. So a prompt waits here while
another one is read with which it could share such a block, and is read to its end before it is cancelled. It knows
nothing of the pipeline.
"""

from __future__ import annotations

_ID_BYTES = 8
_BLOCK_TOKENS = 32
_MOST = 4096
"""Short prompts that are remembered; when there are more, all that begin alike wait for each other."""


class Reading:
    """The prompts that have not given a token yet."""

    def __init__(self, *, reused: bool) -> None:
        """``reused``: whether the cache is used again at all."""
        self._reused = reused
        self._prompts: dict[int, bytes] = {}
        """Their first block."""
        self._short: set[bytes] = set()
        """Prompts of less than a block that were read once. Who gets a first block that is partly filled begins with
        one."""

    def may_begin(self, ids: bytes) -> bool:
        """Whether no prompt that is being read could share a block with this one. ``ids``: int64 each."""
        return not any(self._may_share(ids, other) for other in self._prompts.values())

    def begin(self, key: int, ids: bytes) -> None:
        if not self._reused:
            return
        self._prompts[key] = ids[: _BLOCK_TOKENS * _ID_BYTES]
        if len(ids) < _BLOCK_TOKENS * _ID_BYTES and len(self._short) < _MOST:
            self._short.add(ids)

    def over(self, key: int) -> None:
        """It has given a token, or it has ended."""
        self._prompts.pop(key, None)

    def __contains__(self, key: int) -> bool:
        return key in self._prompts

    def _may_share(self, ids: bytes, other: bytes) -> bool:
        if len(self._short) == _MOST:
            return ids[:_ID_BYTES] == other[:_ID_BYTES]
        for end in range(_ID_BYTES, min(len(ids), len(other)) + 1, _ID_BYTES):
            if ids[:end] != other[:end]:
                return False
            if ids[:end] in self._short:
                return True
        return len(other) == _BLOCK_TOKENS * _ID_BYTES <= len(ids)
