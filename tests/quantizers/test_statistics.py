"""What is remembered of activations, held against hooks in transformers and against numpy over all rows at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.quantizers.calibrated import ROPES, hooked, load, random_samples
from toolchain import family
from toolchain.checkpoint import Checkpoint
from toolchain.quantizers.calibration import Calibration
from toolchain.quantizers.source import Source
from toolchain.quantizers.statistics import (
    OUTLIER_RATIO,
    SAMPLE_ROWS,
    LayerStatistics,
    NonFiniteActivationsError,
)


@pytest.mark.parametrize("shape", ["gqa", "llama3-rope", "biased", "qwen2"])
def test_ranges_of_inputs_keys_and_values_are_those_that_hooks_in_transformers_see(
    random_llama: Callable[..., Path], tmp_path: Path, shape: str
) -> None:
    """In bfloat16, where both compute the same bits; 48 samples of 64 tokens go through in two chunks."""
    model = random_llama(dtype="bfloat16", **ROPES[shape])
    samples = random_samples(48, 64)
    theirs = hooked(load(model, torch.bfloat16), torch.from_numpy(samples.token_ids))
    calibration = Calibration(Source(Checkpoint.open(model)), samples, tmp_path)
    calibration.embed()
    for layer in range(2):
        seen, _ = calibration.observe(layer)
        for group in family.SHARED_INPUT:
            for linear in group:
                assert seen.inputs[group[0]].amax == float(theirs[family.linear_name(layer, linear)].abs().max())
        assert seen.k_amax == float(theirs[f"model.layers.{layer}.k"].abs().max())
        assert seen.v_amax == float(theirs[f"model.layers.{layer}.v"].abs().max())


def test_means_hessian_and_ranges_are_numpys_over_all_rows_at_once() -> None:
    rows = np.random.default_rng(0).standard_normal((700, 48)).astype(np.float32)
    rows[:, 5] *= 300
    rows[3, 5] = 4000
    collected = LayerStatistics(len(rows), rows=True, hessian=True)
    for part in np.split(rows, [100, 101, 450]):
        collected.tap("mlp.gate_proj", torch.from_numpy(part))
    seen = collected.inputs["mlp.gate_proj"]
    assert seen.rows == 700
    assert seen.amax == np.abs(rows).max() == 4000
    np.testing.assert_allclose(seen.channel_mean.numpy(), np.abs(rows.astype(np.float64)).mean(0), rtol=1e-5)
    wide = rows.astype(np.float64)
    hessian = seen.take_hessian()
    scale = np.sqrt(np.outer(np.diag(wide.T @ wide), np.diag(wide.T @ wide)))
    assert (np.abs(hessian.numpy() - wide.T @ wide) / scale).max() < 1e-5
    assert seen.hessian is None
    assert seen.outliers == [(5, 4000.0)]
    assert np.median(np.abs(rows).max(0)) * OUTLIER_RATIO < 4000


@pytest.mark.parametrize("total", [10, SAMPLE_ROWS, SAMPLE_ROWS + 1, 5000])
@pytest.mark.parametrize("chunk", [7, 512])
def test_kept_rows_are_evenly_spread_whatever_the_chunks(total: int, chunk: int) -> None:
    rows = torch.arange(total, dtype=torch.float32).view(-1, 1).repeat(1, 2)
    collected = LayerStatistics(total, rows=True)
    for part in rows.split(chunk):
        collected.tap("mlp.down_proj", part)
    every = -(-total // SAMPLE_ROWS)
    kept = collected.inputs["mlp.down_proj"].sample
    assert torch.equal(kept, rows[::every])
    assert len(kept) <= SAMPLE_ROWS
    assert len(kept) > SAMPLE_ROWS // 2 or len(kept) == total


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("tap", ["self_attn.o_proj", "k", "v"])
def test_nan_and_infinity_are_refused_by_the_name_of_the_tap(tap: str, value: float) -> None:
    x = torch.zeros(4, 8)
    x[2, 3] = value
    with pytest.raises(NonFiniteActivationsError) as caught:
        LayerStatistics(4).tap(tap, x)
    assert caught.value.tap == tap
