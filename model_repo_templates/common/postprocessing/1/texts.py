"""What ``postprocessing`` computes. It knows nothing of Triton."""

from __future__ import annotations

import numpy as np
from detokenizer import Anchor, Decoder


def detokenize(
    tokenizer: Decoder, anchor: Anchor, tokens: np.ndarray, lengths: np.ndarray, *, skip_special: bool = True
) -> list[str]:
    """Ids [b, beams, n] and how many of each row count [b, beams] -> one text a row, b * beams of them in order."""
    rows = tokens.reshape(lengths.size, -1) if lengths.size else tokens.reshape(0, 0)
    return [
        anchor.decode(tokenizer, row[:length].tolist(), skip_special=skip_special)
        for row, length in zip(rows, lengths.reshape(-1).tolist(), strict=True)
    ]
