"""SmoothQuant beside NVIDIA ModelOpt's, alpha 0.5: the same channel scales, the same codes but for its roundings.

Per matrix ModelOpt rounds W / p to the model's dtype, and q/k/v and gate/up once more when it replaces each one's own p
by their mean; it keeps the input scale of the own ones. We round once, and take the input scale of what is stored.
`make test-oracle` runs these tests.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.oracle.conftest import as_bytes
from tests.oracle.test_as_good import groups, held_out, logit_error
from tests.oracle.test_same_bits import same_documents
from tests.quantizers.calibrated import hooked, load
from tests.quantizers.unified_folder import tensors_of
from toolchain.quantizers import int8
from toolchain.quantizers.rows import Workers

Ours = Callable[..., Path]
SQ = {"weights": "int8_sq"}


def test_smoothquant_folder_has_the_same_tensors_and_documents(theirs: Path, ours: Ours) -> None:
    found, expected = tensors_of(ours(**SQ)), tensors_of(theirs / "int8-sq")
    assert {name: (one.dtype, one.shape) for name, one in found.items()} == {
        name: (one.dtype, one.shape) for name, one in expected.items()
    }
    same_documents(ours(**SQ), theirs / "int8-sq")


def test_pre_quant_scales_and_what_is_not_quantized_have_the_same_bytes(theirs: Path, ours: Ours) -> None:
    found, expected = tensors_of(ours(**SQ)), tensors_of(theirs / "int8-sq")
    compared = [name for name in expected if name.endswith(("pre_quant_scale", "norm.weight", "embed_tokens.weight"))]
    assert len(compared) == 3 * 7 + 3 * 2 + 2
    assert [name for name in compared if not torch.equal(as_bytes(found[name]), as_bytes(expected[name]))] == []


def test_codes_are_modelopts_once_the_weights_are_rounded_as_it_rounds_them(theirs: Path) -> None:
    source, expected = tensors_of(theirs / "hf"), tensors_of(theirs / "int8-sq")
    dtype = source["model.norm.weight"].dtype
    seen = hooked(load(theirs / "hf", dtype), load_file(theirs / "ids.safetensors")["ids"])
    with Workers(2) as workers:
        for group in groups(theirs / "hf"):
            activity = seen[group[0]].abs().flatten(0, 1).amax(0).float()
            weights = [source[f"{name}.weight"] for name in group]
            own = [(one.abs().amax(0).sqrt() / activity.sqrt()).clamp(1e-4, 1e4) for one in weights]
            mean = torch.stack([one.to(dtype) for one in own]).mean(0)
            for name, weight, scale in zip(group, weights, own, strict=True):
                rounded = (weight * (1 / scale)).to(dtype)
                if not torch.equal(scale.to(dtype), mean):
                    rounded = (rounded.float() * scale.to(dtype).float() / mean.float()).to(dtype)
                made = int8.quantize(rounded, workers)
                assert torch.equal(made.code, expected[f"{name}.weight"]), name
                assert torch.equal(made.scale, expected[f"{name}.weight_scale"]), name


def test_codes_differ_by_modelopts_roundings_alone(theirs: Path, ours: Ours) -> None:
    found, expected = tensors_of(ours(**SQ)), tensors_of(theirs / "int8-sq")
    most = {torch.float16: 0.012, torch.bfloat16: 0.08}[found["model.norm.weight"].dtype]
    names = [name for name in expected if expected[name].dtype == torch.int8]
    apart = [(found[name].int() - expected[name].int()).abs() for name in names]
    assert max(int(one.max()) for one in apart) <= 2
    assert sum(int((one > 0).sum()) for one in apart) / sum(one.numel() for one in apart) < most


def test_input_scales_fit_the_stored_pre_quant_scales(theirs: Path, ours: Ours) -> None:
    """ModelOpt's are those of each matrix's own scale, rounded: equal where there is one matrix."""
    found, expected = tensors_of(ours(**SQ)), tensors_of(theirs / "int8-sq")
    dtype = found["model.norm.weight"].dtype
    seen = hooked(load(theirs / "hf", dtype), load_file(theirs / "ids.safetensors")["ids"])
    for group in groups(theirs / "hf"):
        for name in group:
            largest = (seen[name] * found[f"{name}.pre_quant_scale"]).abs().max().float()
            assert torch.equal(found[f"{name}.input_scale"], largest / 127)
            ratio = float(found[f"{name}.input_scale"] / expected[f"{name}.input_scale"])
            assert 0.85 < ratio < 1.18, name
            if len(group) == 1:
                assert abs(ratio - 1) < 2**-7, name


def test_smoothquant_has_no_larger_logit_error(theirs: Path, ours: Ours) -> None:
    for ids in (load_file(theirs / "ids.safetensors")["ids"], held_out()):
        limit = logit_error(theirs / "int8-sq", theirs / "hf", ids)
        assert logit_error(ours(**SQ), theirs / "hf", ids) <= limit
