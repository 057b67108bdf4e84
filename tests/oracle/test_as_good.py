"""AWQ (W4A16, W4A8) beside NVIDIA ModelOpt's: the same codes from the same scales, a search that finds as good ones.

Logits of such small random models scatter: scaling every channel by a random 2 % moves their error by 2.3 % (standard
deviation over 8 trials), which is more than what two good searches differ by. The errors of the layers' outputs, 12
groups of matrices together, scatter far less. So those are compared for each model, the logits' for all models
together and with room for chance for each one. `make test-oracle` runs these tests.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.oracle.conftest import MODELS
from tests.oracle.test_same_bits import same_documents
from tests.quantizers.calibrated import hooked
from tests.quantizers.unified_folder import logits_of, model_of, tensors_of
from toolchain import family
from toolchain.quantizers import awq, int4
from toolchain.quantizers.rows import Workers

Ours = Callable[..., Path]
NORM_BEFORE = {"self_attn.q_proj": "input_layernorm", "mlp.gate_proj": "post_attention_layernorm"}
WAYS = {"awq": {"weights": "int4", "method": "awq"}, "w4a8": {"weights": "int4_fp8"}}
CHANCE = 1.05
"""About twice the standard deviation of one model's logit error."""


def held_out() -> torch.Tensor:
    """Rows that nothing was calibrated on."""
    return torch.randint(0, 512, (16, 64), generator=torch.Generator().manual_seed(77))


def groups(folder: Path) -> list[tuple[str, ...]]:
    """The full names of the matrices that read one input, for each layer."""
    layers = range(read(folder).config.num_hidden_layers)
    return [tuple(family.linear_name(layer, one) for one in group) for layer in layers for group in family.SHARED_INPUT]


def logit_error(made: Path, model: Path, ids: torch.Tensor) -> float:
    """Relative, against the unquantized model, all in float32; inputs are rounded where the format rounds them."""
    exact = logits_of(read(model), ids)
    return float((logits_of(read(made), ids) - exact).norm() / exact.norm())


@functools.lru_cache(maxsize=32)
def read(folder: Path) -> Any:
    """``model_of``, once for each folder."""
    return model_of(folder, activations=True)


def output_error(made: Path, model: Path, ids: torch.Tensor) -> float:
    """Relative error of what the linears put out, on the unquantized model's activations: root mean over all groups."""
    exact, inputs = read(model).state_dict(), hooked(read(model), ids)
    found, parts = read(made).state_dict(), []
    for group in groups(model):
        x = inputs[group[0]].flatten(0, 1).T
        first = group[0].split(".", 3)
        norm = f"model.layers.{first[2]}.{NORM_BEFORE.get(first[3], '')}.weight"
        folded = found[norm] / exact[norm] if norm in exact else torch.ones(())
        wrong = [(found[f"{name}.weight"] * folded - exact[f"{name}.weight"]) @ x for name in group]
        right = [exact[f"{name}.weight"] @ x for name in group]
        parts.append(sum(float(one.square().sum()) for one in wrong) / sum(float(one.square().sum()) for one in right))
    return (sum(parts) / len(parts)) ** 0.5


@pytest.mark.parametrize("way", WAYS)
def test_awq_folder_has_the_same_tensors_and_documents(theirs: Path, ours: Ours, way: str) -> None:
    made = ours(**WAYS[way])
    found, expected = (
        {name: (one.dtype, one.shape) for name, one in tensors_of(folder).items()} for folder in (made, theirs / way)
    )
    assert found == expected
    same_documents(made, theirs / way)


@pytest.mark.parametrize("way", WAYS)
def test_awq_codes_from_modelopts_own_scales_differ_in_less_than_two_percent_of_the_bytes(
    theirs: Path, way: str
) -> None:
    """ModelOpt rounds the scaled weights to the model's dtype, q/k/v and gate/up twice; we round once."""
    chosen, source = load_file(theirs / f"{way}.safetensors"), tensors_of(theirs / "hf")
    expected = tensors_of(theirs / way)
    different = total = 0
    with Workers(2) as workers:
        for group in groups(theirs / "hf"):
            scale = torch.stack([chosen[f"{name}.scale"].reciprocal() for name in group]).mean(0).reciprocal()
            made = [
                awq.apply(source[f"{name}.weight"], scale, group_size=128, scales="modelopt", workers=workers)
                for name in group
            ]
            for name, one in zip(group, made, strict=True):
                wrong = one.packed != expected[f"{name}.weight"]
                assert float(wrong.float().mean()) < 0.02, name
                different, total = different + int(wrong.sum()), total + wrong.numel()
                torch.testing.assert_close(one.scale, expected[f"{name}.weight_scale"], rtol=2**-6, atol=0)
                if way == "w4a8":
                    second = int4.e4m3_scale(made, workers)
                    torch.testing.assert_close(second, expected[f"{name}.weight_scale_2"], rtol=2**-6, atol=0)
    assert total == sum(tensor.numel() for tensor in expected.values() if tensor.dtype == torch.uint8)
    rounding = {torch.float16: 0.003, torch.bfloat16: 0.015}[source["model.norm.weight"].dtype]
    assert different / total < rounding


@pytest.mark.parametrize("rows", ["calibration", "held-out"])
@pytest.mark.parametrize("way", WAYS)
def test_awq_search_has_no_larger_output_error(theirs: Path, ours: Ours, way: str, rows: str) -> None:
    ids = load_file(theirs / "ids.safetensors")["ids"] if rows == "calibration" else held_out()
    limit = output_error(theirs / way, theirs / "hf", ids)
    assert output_error(ours(**WAYS[way]), theirs / "hf", ids) <= limit
    assert output_error(ours(**WAYS[way], scales="mse"), theirs / "hf", ids) < 0.85 * limit


@pytest.mark.parametrize("way", WAYS)
def test_awq_with_mse_scales_has_a_smaller_logit_error(theirs: Path, ours: Ours, way: str) -> None:
    limit = logit_error(theirs / way, theirs / "hf", held_out())
    assert logit_error(ours(**WAYS[way], scales="mse"), theirs / "hf", held_out()) < 0.97 * limit


@pytest.mark.parametrize("way", WAYS)
def test_awq_with_modelopts_group_scales_has_no_larger_logit_error(
    exports: Path, our_folders: Callable[[str], Ours], way: str
) -> None:
    sums = [0.0, 0.0]
    for name in MODELS:
        made = our_folders(name)(**WAYS[way])
        for ids in (load_file(exports / name / "ids.safetensors")["ids"], held_out()):
            found, limit = (logit_error(one, exports / name / "hf", ids) for one in (made, exports / name / way))
            assert found <= CHANCE * limit
            sums = [sums[0] + found, sums[1] + limit]
    assert sums[0] <= sums[1]
