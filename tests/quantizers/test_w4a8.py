"""The second scale of int4 weights with FP8 activations: what a kernel makes of the codes must be e4m3 numbers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from toolchain.quantizers import SCALES, int4
from toolchain.quantizers.rows import Workers


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    with Workers(2) as made:
        yield made


def weights(seed: int, dtype: torch.dtype = torch.bfloat16, rows: int = 1100) -> torch.Tensor:
    values = torch.randn(rows, 512, generator=torch.Generator().manual_seed(seed)) * 0.02
    values[3] = 0
    values[7, :128] *= 20
    return values.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_with_amax_scales_it_is_amax_over_448_bit_for_bit(dtype: torch.dtype, workers: Workers) -> None:
    pair = [weights(0, dtype), weights(1, dtype) * 3]
    made = [int4.quantize(weight, 128, "modelopt", workers) for weight in pair]
    largest = torch.stack([weight.float().abs().max() for weight in pair]).max()
    assert torch.equal(int4.e4m3_scale(made, workers), largest / 448)


@pytest.mark.parametrize("scales", SCALES)
def test_every_weight_of_the_group_is_within_e4m3s_range_and_one_reaches_it(scales: str, workers: Workers) -> None:
    made = [int4.quantize(weights(seed), 128, scales, workers) for seed in (0, 1)]
    second = int4.e4m3_scale(made, workers)
    reached = [int4.dequantize(one.packed, one.scale).div(second).abs().max() for one in made]
    assert float(max(reached)) == pytest.approx(448, rel=1e-6)
    assert all(torch.isfinite((value * 0.999).to(torch.float8_e4m3fn).float()) for value in reached)


def test_the_code_minus_eight_counts(workers: Workers) -> None:
    codes = torch.zeros(2, 128, dtype=torch.int8)
    codes[0, 0], codes[1, 0] = -8, 7
    matrix = int4.Int4Matrix(int4.pack(codes), torch.tensor([[1.0], [1.1]]), error=None)  # type: ignore[arg-type]
    assert float(int4.e4m3_scale([matrix], workers)) == pytest.approx(8 / 448)


def test_groups_that_are_all_zero_do_not_count(workers: Workers) -> None:
    """Their scale is stored as 1, which would leave the others with the smallest e4m3 numbers."""
    made = int4.quantize(weights(0), 128, "modelopt", workers)
    assert made.scale[3].tolist() == [1] * 4
    assert float(int4.e4m3_scale([made], workers)) < 0.01
    zero = int4.quantize(torch.zeros(4, 128), 128, "modelopt", workers)
    assert float(int4.e4m3_scale([zero], workers)) == 1


def test_workers_do_not_change_a_bit() -> None:
    found = []
    for threads in (1, 3):
        with Workers(threads) as pool:
            found.append(int4.e4m3_scale([int4.quantize(weights(0), 128, "mse", pool)], pool))
    assert torch.equal(*found)
