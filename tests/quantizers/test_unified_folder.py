"""What our quantizers write, read by code that shares nothing with them (``unified_folder``), and by the CPU engine.

The engine computes in float32 here. Logits as large as 4.9 differ by at most 7.1e-6 over all variants; the tolerance is
five times that.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.backends.test_openvino import Stateful, span
from tests.quantizers.calibrated import load, random_samples
from tests.quantizers.unified_folder import logits_of, model_of, tensors_of
from tests.stages.test_quantize_calibrated import calibrate, rewritten
from toolchain.backends import openvino as backend
from toolchain.checkpoint import Checkpoint
from toolchain.progress import Silent

INT4 = {"weights": "int4", "group_size": 64, "scales": "mse", "kv": "fp16"}
FP8 = {"weights": "fp8", "group_size": 128, "scales": "mse", "kv": "fp8"}
WAYS: dict[str, tuple[dict[str, Any], float]] = {
    "fp8-shared": (FP8, 0.12),
    "fp8-separate": (FP8 | {"fp8_scales": "separate"}, 0.12),
    "int4-rtn": (INT4 | {"method": "rtn"}, 0.37),
    "int4-awq": (INT4 | {"method": "awq"}, 0.32),
    "int4-awq-g128-clip": (INT4 | {"method": "awq", "group_size": 128, "clip": True}, 0.36),
    "int4-gptq": (INT4 | {"method": "gptq"}, 0.30),
}
"""How, and how far the logits may be from those of the unquantized model (relative; 1.2 times what was measured)."""
MODELS = {
    "gqa-float16": {"dtype": "float16"},
    "mha-tied-bfloat16": {"dtype": "bfloat16", "num_key_value_heads": 4, "tie_word_embeddings": True},
}
TOLERANCE = 3.5e-5


@pytest.fixture(scope="module", params=MODELS)
def model(
    request: pytest.FixtureRequest, random_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Activations that differ much between channels, so that AWQ has scales to fold."""
    generator = torch.Generator().manual_seed(5)

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=generator).exp().to(tensor.dtype) if "norm" in name else tensor

    return rewritten(random_llama(**MODELS[request.param]), tmp_path_factory.mktemp("model") / "model", change)


@pytest.mark.parametrize("way", WAYS)
def test_the_cpu_engine_and_a_reader_of_the_documentation_give_the_same_logits(
    model: Path, way: str, tmp_path: Path
) -> None:
    choices, most = WAYS[way]
    made = calibrate(model, tmp_path / "made", **choices)
    ids = torch.from_numpy(random_samples(2, 64, seed=3).token_ids).long()
    expected = logits_of(model_of(made), ids)
    backend.write(Checkpoint.open(made), tmp_path / "engine", Silent())
    found = Stateful(tmp_path / "engine")(ids.numpy(), np.ones((2, 64), np.int64), span(2, 0, 64))
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=TOLERANCE)
    exact = logits_of(load(model, torch.float32), ids)
    error = float((expected - exact).norm() / exact.norm())
    assert 0 < error < most


def test_awq_has_folded_norms_and_pre_quant_scales_to_read(model: Path, tmp_path: Path) -> None:
    """Without either, the test above would show less than it says."""
    made = tensors_of(calibrate(model, tmp_path / "made", **WAYS["int4-awq"][0]))
    plain = tensors_of(model)
    norms = [name for name in plain if "layernorm" in name]
    assert any(not torch.equal(made[name], plain[name]) for name in norms)
    assert any(
        name.endswith("pre_quant_scale") and not torch.equal(tensor, torch.ones_like(tensor))
        for name, tensor in made.items()
    )
