"""What goes wrong behind ``tensorrt_llm_bls``. It knows nothing of Triton."""

from __future__ import annotations


class FailedError(Exception):
    """A model behind this one answered with an error; ``code`` is the name of a Triton error code, or its number."""

    def __init__(self, message: str, code: str | int) -> None:
        super().__init__(message)
        self.message, self.code = message, code


class CutError(FailedError):
    """The server could not be reached, or its answer broke off."""
