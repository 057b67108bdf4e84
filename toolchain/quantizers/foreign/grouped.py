"""Integer weights with a scale and a zero point for each group: unpacked, checked, and packed as our layout has them.

W[out, in] = (q - z) * scale with q and z unsigned. Our layout is symmetric: int4 codes -8..7 in groups, int8 codes
-128..127 with one scale per row. So a matrix is exact where q - z lies in that range for every weight, and refused
elsewhere: nothing is rounded again. Only the order of bits differs between tools, and the formats say which it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from toolchain import family
from toolchain.checkpoint import TensorInfo
from toolchain.errors import PlanError
from toolchain.quantization import WEIGHTS
from toolchain.quantizers.foreign.folder import KEPT_GROUPS, START_ANEW, Array, Folder
from toolchain.quantizers.layout import Scheme

Codes = npt.NDArray[np.uint8]
_BLOCK_COLUMNS = 1024


class GroupedFolder(Folder):
    """A folder of such weights; ``bits`` is 4 or 8, ``group`` the input channels per scale (-1 for a whole row).

    A format gives the three methods below, all with input channels first, which is how most tools store them.
    """

    def __init__(
        self, path: Path, raw: Mapping[str, Any], tensors: Mapping[str, TensorInfo], *, bits: int, group: int
    ) -> None:
        super().__init__(path, raw, tensors)
        self.bits = bits
        self.group = group
        self.kept_group = self._kept_group()
        self.scheme = Scheme("int4" if bits == 4 else "int8", self.kept_group or KEPT_GROUPS[0], "modelopt", "fp16")

    def codes(self, module: str, columns: slice) -> Codes:
        """The codes q of some input channels, whole groups of them: uint8 [in, out]."""
        raise NotImplementedError

    def zeros(self, module: str) -> Codes:
        """The zero points: uint8 [groups, out]."""
        raise NotImplementedError

    def scales(self, module: str) -> npt.NDArray[np.float32]:
        """[groups, out]"""
        raise NotImplementedError

    def shape(self, module: str) -> tuple[int, int]:
        """[out, in] of a matrix."""
        _, _, _, linear = module.split(".", 3)
        return family.linear_shape(self.config, linear)

    def groups(self, module: str) -> tuple[int, int]:
        """How many groups a row has, and the input channels of each."""
        columns = self.shape(module)[1]
        size = columns if self.group == -1 else self.group
        return columns // size, size

    def unpack(self, words: Array) -> Codes:
        """int32 [n, m] -> uint8 [n, m, codes of a word], low bits first."""
        if self.bits == 4:
            return nibbles_of(words)
        return np.ascontiguousarray(words).view(np.uint8).reshape(*words.shape, 4)

    def check_order(self, name: str, dtypes: tuple[str, ...], columns: int, size: int, called: str = "") -> None:
        """PlanError where a tensor ``name`` is there and assigns input channels to groups out of order."""
        if name in self.tensors and (self.array(name, dtypes, (columns,)) != np.arange(columns) // size).any():
            raise PlanError(
                f"{self.path}: act order: {name} assigns input channels to groups out of order{called}, which our "
                "layout cannot hold",
                hint=START_ANEW,
            )

    def _kept_group(self) -> int | None:
        """The group size in our layout: a row's or a larger group's scale is repeated. PlanError where none fits."""
        widths = {family.linear_shape(self.config, linear)[1] for linear in family.LINEARS}
        if self.bits == 8:
            if self.group != -1 and widths != {self.group}:
                raise PlanError(
                    f"{self.path}: its int8 weights have one scale for {self.group} input channels; the layout has one "
                    "for a whole row, so they would have to be rounded again",
                    hint=START_ANEW,
                )
            if "int8" not in WEIGHTS:
                raise PlanError(f"{self.path}: int8 weights are not in this release", hint=START_ANEW)
            return None
        sizes = widths if self.group == -1 else {self.group}
        fitting = [size for size in KEPT_GROUPS if all(one % size == 0 for one in (*sizes, *widths))]
        if not fitting or any(width % size for width in widths for size in sizes if self.group != -1):
            raise PlanError(
                f"{self.path}: its int4 weights share one scale in groups of {self.group}; scalellm holds groups of "
                f"{', '.join(map(str, KEPT_GROUPS))}, or of a multiple of them, that divide the model's widths",
                hint=START_ANEW,
            )
        return fitting[0]

    @property
    def middle(self) -> int:
        """The zero point of symmetric weights: 8 or 128."""
        return 1 << (self.bits - 1)

    def misfits(self, module: str) -> tuple[int, int]:
        """Groups of a matrix in which some q - z is beyond what we can hold, and how many groups there are."""
        zeros = self.zeros(module)
        if (zeros == self.middle).all():
            return 0, zeros.size
        count, size = self.groups(module)
        step = max(1, _BLOCK_COLUMNS // size)
        bad = 0
        for start in range(0, count, step):
            stop = min(count, start + step)
            block = self.codes(module, slice(start * size, stop * size)).reshape(stop - start, size, -1)
            zero = zeros[start:stop].astype(np.int16)
            low, high = block.min(1).astype(np.int16) - zero, block.max(1).astype(np.int16) - zero
            bad += int(((low < -self.middle) | (high >= self.middle)).sum())
        return bad, zeros.size

    def check(self, advance: Callable[[int], None]) -> None:
        """Every scale, and where there are zero points every weight. PlanError with the share that does not fit."""
        bad = total = 0
        first = ""
        for layer, linear in family.layer_linears(self.config):
            module = family.linear_name(layer, linear)
            self.scales(module)
            wrong, groups = self.misfits(module)
            bad, total, first = bad + wrong, total + groups, first or (module if wrong else "")
            for suffix in self.suffixes:
                if f"{module}.{suffix}" in self.tensors:
                    advance(self.tensors[f"{module}.{suffix}"].nbytes)
                    self.store.release(f"{module}.{suffix}")
        if bad:
            raise self.zero_points_do_not_fit(bad, total, first)

    def zero_points_do_not_fit(self, bad: int, total: int, first: str) -> PlanError:
        """What is wrong where ``bad`` of the ``total`` groups that were looked at do not fit, ``first`` in a matrix."""
        low, high = -self.middle, self.middle - 1
        return PlanError(
            f"{self.path}: it has zero points, and in {100 * bad / total:.1f} % of its groups ({bad} of {total}, the "
            f"first in {first}) some weight minus its zero point is not in {low}..{high}, which is all that symmetric "
            f"int{self.bits} holds",
            hint=START_ANEW,
        )

    def linear(self, module: str, suffix: str) -> Array:
        if suffix == "weight_scale":
            scales = np.repeat(self.scales(module), self._repeats(module), axis=0)
            return scales.T if self.bits == 4 else scales[0]
        return self._int4(module) if self.bits == 4 else self._int8(module)

    def _repeats(self, module: str) -> int:
        return self.groups(module)[1] // (self.kept_group or self.groups(module)[1])

    def _int4(self, module: str) -> Codes:
        """uint8 [out/2, in]: row 2r in the low nibble, row 2r+1 in the high one, two's complement."""
        rows, columns = self.shape(module)
        size, zeros = self.groups(module)[1], self.zeros(module)
        packed = np.empty((rows // 2, columns), np.uint8)
        step = max(size, _BLOCK_COLUMNS // size * size)
        for start in range(0, columns, step):
            part = slice(start, min(columns, start + step))
            zero = np.repeat(zeros[part.start // size : part.stop // size], size, axis=0)
            nibbles = (self.codes(module, part) - zero) & 15
            packed[:, part] = (nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)).T
        return packed

    def _int8(self, module: str) -> Array:
        """int8 [out, in]"""
        rows, columns = self.shape(module)
        zeros = self.zeros(module)
        found = np.empty((rows, columns), np.int8)
        for start in range(0, columns, _BLOCK_COLUMNS):
            part = slice(start, min(columns, start + _BLOCK_COLUMNS))
            found[:, part] = (self.codes(module, part) - zeros).view(np.int8).T
        return found


def nibbles_of(words: Array, order: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7)) -> Codes:
    """int32 [n, m] -> uint8 [n, m, 8]: nibble i of a word, counted from its lowest bits, at place ``order[i]``."""
    halves = np.ascontiguousarray(words).view(np.uint8).reshape(*words.shape, 4)
    found = np.empty((*words.shape, 8), np.uint8)
    for byte in range(4):
        found[..., order[2 * byte]] = halves[..., byte] & 15
        found[..., order[2 * byte + 1]] = halves[..., byte] >> 4
    return found
