"""What calibration remembers of a layer's activations: ranges, channel means, a few rows, and X^T X for GPTQ.

Fed by the taps of ``forward`` chunk after chunk, in memory that does not grow with the samples. No file, no method.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

SAMPLE_ROWS = 1024
"""Rows of X that are kept for a search: ModelOpt's AWQ looks at every token, and 1024 give the same alphas."""

OUTLIER_RATIO = 10.0
"""A channel is an outlier when its largest |x| exceeds this multiple of the median channel's. Ours, for the report."""
MOST_OUTLIERS = 8


class NonFiniteActivationsError(ValueError):
    """NaN or infinity at the tap ``tap``; the caller knows the layer and the samples."""

    def __init__(self, tap: str) -> None:
        super().__init__(tap)
        self.tap = tap


@dataclass
class InputStatistics:
    """Of the input X [rows, in] that the matrices of one group of ``family.SHARED_INPUT`` read."""

    amax: float = 0.0
    """max |x|."""
    rows: int = 0
    channel_sum: torch.Tensor | None = None
    """float32 [in]: the sum of |x| over the rows."""
    channel_amax: torch.Tensor | None = None
    """[in]: max |x| over the rows."""
    hessian: torch.Tensor | None = None
    """float32 [in, in]: X^T X, where it was asked for."""
    kept: list[torch.Tensor] = field(default_factory=list)

    @property
    def channel_mean(self) -> torch.Tensor:
        """float32 [in]: the mean of |x|."""
        assert self.channel_sum is not None
        return self.channel_sum / self.rows

    @property
    def sample(self) -> torch.Tensor:
        """[at most 1024, in]: rows at equal distances over all samples, in the dtype of the forward pass."""
        return torch.cat(self.kept)

    def take_hessian(self) -> torch.Tensor:
        """``hessian``, which is forgotten here."""
        assert self.hessian is not None
        hessian, self.hessian = self.hessian, None
        return hessian

    @property
    def outliers(self) -> list[tuple[int, float]]:
        """(channel, max |x|) where that is more than 10 times the median channel's, largest first, at most 8."""
        assert self.channel_amax is not None
        largest = self.channel_amax.float()
        values, channels = largest.topk(min(MOST_OUTLIERS, len(largest)))
        least = OUTLIER_RATIO * float(largest.median())
        found = zip(channels.tolist(), values.tolist(), strict=True)
        return [(int(channel), float(value)) for channel, value in found if value > least]


class LayerStatistics:
    """Collects what one layer shows; ``tap`` is the tap of ``forward.decoder_layer``.

    ``total_rows`` is the number of tokens that will come in all, from which the distance of the kept rows follows.
    ``inputs=False`` watches only K and V.
    """

    def __init__(self, total_rows: int, *, inputs: bool = True, rows: bool = False, hessian: bool = False) -> None:
        self._every = max(1, -(-total_rows // SAMPLE_ROWS))
        self._inputs, self._rows, self._hessian = inputs, rows, hessian
        self.inputs: dict[str, InputStatistics] = {}
        """By the first linear of each group."""
        self.k_amax = 0.0
        """max |K| after rotation."""
        self.v_amax = 0.0

    def tap(self, name: str, x: torch.Tensor) -> None:
        """Raises NonFiniteActivationsError."""
        if name == "k":
            self.k_amax = max(self.k_amax, _amax(name, x))
        elif name == "v":
            self.v_amax = max(self.v_amax, _amax(name, x))
        elif self._inputs:
            self._input(self.inputs.setdefault(name, InputStatistics()), name, x)

    def _input(self, found: InputStatistics, name: str, x: torch.Tensor) -> None:
        found.amax = max(found.amax, _amax(name, x))
        magnitude = x.abs()
        total, largest = magnitude.sum(0, dtype=torch.float32), magnitude.amax(0)
        found.channel_sum = total if found.channel_sum is None else found.channel_sum.add_(total)
        found.channel_amax = largest if found.channel_amax is None else torch.maximum(found.channel_amax, largest)
        if self._rows:
            first = -found.rows % self._every
            found.kept.append(x[first :: self._every].clone())
        if self._hessian:
            wide = x.float()
            if found.hessian is None:
                found.hessian = torch.zeros(x.shape[1], x.shape[1], device=x.device)
            found.hessian.addmm_(wide.T, wide)
        found.rows += len(x)


def _amax(name: str, x: torch.Tensor) -> float:
    low, high = torch.aminmax(x)
    largest = torch.maximum(-low, high)  # keeps NaN, which Python's max would not
    if not torch.isfinite(largest):
        raise NonFiniteActivationsError(name)
    return float(largest)
