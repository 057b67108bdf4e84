"""GPTQ: round column after column, each rounding error made up for by the columns that are not rounded yet.

Symmetric int4, columns in their own order, one scale per group of columns, chosen when the group's turn comes (Frantar
et al., https://arxiv.org/abs/2210.17323). The carrier is that of ``int4``. With H = X^T X = R R^T, R upper triangular,
the output error of a row of W is ||(q - w) R||^2, and column j alone decides entry j of that vector once the columns
before it are rounded. That is the paper's recursion without its inverse of H: less arithmetic, one triangle to keep.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from toolchain.quantizers import NotFiniteError, WeightError, int4, total
from toolchain.quantizers.budget import FLOAT64_FACTOR_BYTES
from toolchain.quantizers.int4 import Int4Matrix
from toolchain.quantizers.rows import Scratch, Workers

DAMP = 0.01
"""Of the mean of H's diagonal, added to the diagonal. The paper's value (section 3.3, step 3)."""

_MOST_DAMP = 1.0
_KEPT_ROWS = 512
_REVERSED_AT_ONCE = 2**20
_COLUMNS_IN_FLIGHT = 768  # gives row blocks of 1024 on a CPU: enough for the matrix products, 20 MB at 5120 columns
_STEPS = {"modelopt": int4._amax_over_seven, "mse": int4._least_squares}


@dataclass(frozen=True)
class Factor:
    """H + damping = R R^T. One serves all matrices that read the same input."""

    upper: torch.Tensor
    """R, float32 [in, in], upper triangular."""
    damp: float
    """The damping it took, as a fraction of the mean of H's diagonal."""


@torch.no_grad()
def factor(hessian: torch.Tensor, damp: float = DAMP) -> Factor:
    """X^T X, or any multiple of it, float32 [in, in] -> Factor, in the very memory of ``hessian``, which is given up.

    Half as much again is taken meanwhile, to begin anew from where float32 fails: then float64 is tried, as long as
    such a matrix takes no more than 1 GiB, then ten times the damping, up to the whole mean of the diagonal. Raises
    NotFiniteError for NaN or infinity in ``hessian``, or where it is no Gram matrix at all.
    """
    low, high = torch.aminmax(hessian)  # keeps NaN, and takes no copy as a sum in float64 would
    if not torch.isfinite(high - low):
        raise NotFiniteError
    flipped = _reverse_(hessian.contiguous())  # H = R R^T is, both axes reversed, Cholesky's L L^T
    diagonal = flipped.diagonal().double()
    mean = float(diagonal.mean()) or 1.0
    dtypes = (torch.float32, torch.float64) if 8 * flipped.numel() <= FLOAT64_FACTOR_BYTES else (torch.float32,)
    original = _lower_half(flipped)
    while True:
        on_diagonal = diagonal + damp * mean
        on_diagonal[diagonal == 0] = mean  # a channel that was never active: rounded as it is
        for dtype in dtypes:
            damped = flipped.to(dtype)
            damped.diagonal().copy_(on_diagonal)
            # Its own transpose, so that LAPACK's order of columns costs no copy, and the result takes its place.
            lower, info = damped.mT, torch.empty((), dtype=torch.int32, device=damped.device)
            torch.linalg.cholesky_ex(lower, out=(lower, info))
            if not info and torch.isfinite(lower.diagonal()).all():
                del original
                return Factor(_reverse_(flipped.copy_(damped)).mT, damp)
            _restore_(flipped, original)
        if damp >= _MOST_DAMP:
            raise NotFiniteError
        damp = min(10 * max(damp, DAMP), _MOST_DAMP)


def _reverse_(matrix: torch.Tensor) -> torch.Tensor:
    """A contiguous matrix with both axes reversed, in place: its elements back to front."""
    flat = matrix.view(-1)
    half = len(flat) // 2
    for start in range(0, half, _REVERSED_AT_ONCE):
        front = flat[start : min(start + _REVERSED_AT_ONCE, half)]
        back = flat[len(flat) - start - len(front) : len(flat) - start]
        kept = front.flip(0)
        front.copy_(back.flip(0))
        back.copy_(kept)
    return matrix


def _lower_half(matrix: torch.Tensor) -> list[torch.Tensor]:
    """Copies of the lower triangle of a square matrix, in blocks of rows up to the diagonal's block."""
    return [matrix[start : start + _KEPT_ROWS, : start + _KEPT_ROWS].clone() for start in _block_starts(matrix)]


def _restore_(matrix: torch.Tensor, lower: Sequence[torch.Tensor]) -> None:
    """Make a matrix again the symmetric one whose ``_lower_half`` this is."""
    for start, block in zip(_block_starts(matrix), lower, strict=True):
        matrix[start : start + _KEPT_ROWS, : start + _KEPT_ROWS] = block
        matrix[:start, start : start + _KEPT_ROWS] = block[:, :start].mT


def _block_starts(matrix: torch.Tensor) -> range:
    return range(0, len(matrix), _KEPT_ROWS)


@torch.no_grad()
def quantize(
    weight: torch.Tensor,
    hessian: torch.Tensor | Factor,
    *,
    group_size: int,
    scales: str,
    damp: float = DAMP,
    workers: Workers | None = None,
) -> Int4Matrix:
    """[out, in] of any float dtype and X^T X [in, in], which is left alone, or its ``factor`` -> Int4Matrix.

    ``error`` is that of the weights and larger than plain rounding's; the output's is smaller. The rule ``scales`` sees
    a group's weights with all earlier errors made up for. Raises NotFiniteError for NaN or infinity in either argument.
    The result does not depend on the number of workers.
    """
    rows, columns = weight.shape
    packed = torch.empty(rows // 2, columns, dtype=torch.uint8, device=weight.device)
    scale = torch.empty(rows, columns // group_size, dtype=torch.float32, device=weight.device)

    def block(part: slice, scratch: Scratch) -> WeightError:
        source = weight[part]
        wrong = torch.empty(columns, len(source), device=weight.device)  # (q - w)^T
        squared_norm = 0.0
        for group, start in enumerate(range(0, columns, group_size)):
            here = slice(start, start + group_size)
            original = source[:, here].float()
            made_up = _made_up(original, wrong[:start], upper, here)
            steps = _STEPS[scales](made_up, scratch)
            codes = _round(made_up.T.contiguous(), steps.T, upper[here, here])
            scale[part, group] = steps[:, 0]
            packed[part.start // 2 : part.stop // 2, here] = int4.pack(codes.T.to(torch.int8))
            torch.sub(codes.mul_(steps.T), original.T, out=wrong[here])
            squared_norm += float(original.square().sum())
        flat = wrong.view(-1)
        return WeightError(float(torch.dot(flat, flat)), squared_norm)

    with Workers() if workers is None else nullcontext(workers) as pool:
        upper = (hessian if isinstance(hessian, Factor) else factor(hessian.clone(), damp)).upper
        parts = pool.over_rows(weight[:, :_COLUMNS_IN_FLIGHT], block)
    return Int4Matrix(packed, scale, total(parts))


def _made_up(original: torch.Tensor, wrong: torch.Tensor, upper: torch.Tensor, here: slice) -> torch.Tensor:
    """The group's weights [rows, group] moved so that the output error of all columns before it is least.

    ``wrong`` [start, rows] holds those columns' (q - w)^T. Solves (w' - w) R_here = -(q - w) R_before.
    """
    if not here.start:
        return original
    before = upper[: here.start, here].T @ wrong
    moved = torch.linalg.solve_triangular(upper[here, here].T, before, upper=False)
    return torch.sub(original, moved.T).contiguous()


def _round(target: torch.Tensor, steps: torch.Tensor, upper: torch.Tensor) -> torch.Tensor:
    """[group, rows], group scales [1, rows], the group's own triangle of R -> codes [group, rows].

    Column j is rounded after w_j - sum over i < j of (q_i - w_i) R_ij / R_jj.
    """
    codes, wrong = torch.empty_like(target), torch.empty_like(target)
    feedback = upper / upper.diagonal()
    for j in range(len(target)):
        value = torch.addmv(target[j], wrong[:j].T, feedback[:j, j], alpha=-1) if j else target[j]
        torch.div(value, steps[0], out=codes[j]).round_().clamp_(-8, 7)
        torch.sub(codes[j] * steps[0], target[j], out=wrong[j])
    return codes
