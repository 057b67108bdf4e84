"""Stop words as text: they may begin in one token and end in the next. It knows nothing of Triton or tokens."""

from __future__ import annotations

from collections.abc import Sequence


class StopText:
    """Follows one text. What could be the beginning of a stop word is held back until that is decided."""

    def __init__(self, words: Sequence[str]) -> None:
        self._words = [word for word in words if word]
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that is now certain. After a match: what stands before the stop word, and ``stopped``. Of words that
        overlap, the one that is complete first counts, so that it does not matter in which pieces the text comes."""
        if self.stopped:
            return ""
        self._held += text
        places = [(place + len(word), place) for word in self._words if (place := self._held.find(word)) >= 0]
        if places:
            certain, self._held, self.stopped = self._held[: min(places)[1]], "", True
            return certain
        cut = len(self._held) - max((self._beginning(word) for word in self._words), default=0)
        certain, self._held = self._held[:cut], self._held[cut:]
        return certain

    def finish(self) -> str:
        """What was held back for a stop word that never came."""
        rest, self._held = self._held, ""
        return rest

    def _beginning(self, word: str) -> int:
        """How many of the last held characters are the beginning of ``word``; less than the whole word."""
        longest = min(len(word) - 1, len(self._held))
        return next((length for length in range(longest, 0, -1) if self._held.endswith(word[:length])), 0)
