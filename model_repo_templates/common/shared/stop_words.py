"""Stop words as token ids: what may be given out, what must wait, and when to stop. It knows nothing of Triton."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Follows one sequence. Ids that could be the beginning of a stop word are held back until that is decided."""

    def __init__(self, words: Sequence[Sequence[int]]) -> None:
        self._words = [list(word) for word in words if word]
        self._held: list[int] = []
        self.stopped = False

    def push(self, ids: Sequence[int]) -> list[int]:
        """The ids that are now certain. After a match: those before the stop word, and ``stopped`` is true."""
        certain: list[int] = []
        for token in ids:
            if self.stopped:
                break
            self._held.append(token)
            certain.extend(self._release())
        return certain

    def finish(self) -> list[int]:
        """The ids that were held back for a stop word that never came."""
        rest, self._held = self._held, []
        return rest

    def _release(self) -> list[int]:
        for word in self._words:
            if self._held[-len(word) :] == word:
                certain, self._held, self.stopped = self._held[: -len(word)], [], True
                return certain
        keep = max((self._beginning(word) for word in self._words), default=0)
        cut = len(self._held) - keep
        certain, self._held = self._held[:cut], self._held[cut:]
        return certain

    def _beginning(self, word: list[int]) -> int:
        """How many of the last held ids are the beginning of ``word``; less than the whole word."""
        for length in range(min(len(word) - 1, len(self._held)), 0, -1):
            if self._held[-length:] == word[:length]:
                return length
        return 0
