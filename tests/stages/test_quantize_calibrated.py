"""quantize with calibration, on real small checkpoints: what is written, whether it is better, what kill -9 costs."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.quantizers.calibrated import ROPES, hooked, load, random_samples
from tests.stages.test_quantize import Listening, digests, run, tensors_of
from toolchain import family, workspace
from toolchain.checkpoint import KV_RANGES, Checkpoint
from toolchain.errors import ArtifactError, PlanError
from toolchain.progress import Silent
from toolchain.quantizers.layer import restore
from toolchain.quantizers.place import ON_CPU, Place
from toolchain.quantizers.samples import Samples
from toolchain.stages.quantize import REPORT, quantize

SAMPLES = random_samples(24, 48)
INT4 = {"weights": "int4", "group_size": 64, "scales": "mse", "kv": "fp16"}
FP8 = {"weights": "fp8", "group_size": 128, "scales": "mse", "kv": "fp8"}
SQ = {"weights": "int8_sq", "group_size": 128, "scales": "mse", "kv": "fp16"}
W4A8 = {"weights": "int4_fp8", "group_size": 128, "scales": "modelopt", "kv": "fp16"}
WAYS = {
    "awq": {**INT4, "method": "awq"},
    "awq-clip-quantized": {**INT4, "method": "awq", "clip": True, "propagate": "quantized"},
    "gptq": {**INT4, "method": "gptq"},
    "fp8": FP8,
    "int8_sq": SQ,
    "int8_sq-quantized": {**SQ, "smoothquant_alpha": 0.7, "propagate": "quantized"},
    "int4_fp8": W4A8,
}


def calibrate(
    model: Path,
    target: Path,
    progress: Silent | None = None,
    samples: Samples | None = SAMPLES,
    place: Place = ON_CPU,
    **choices: Any,
) -> Path:
    shards = choices.pop("max_shard_bytes", 2**30)
    digest = samples.digest if samples else None
    with workspace.draft(target, "quantize", {"model": str(model), "samples": digest, **choices}) as draft:
        quantize(
            Checkpoint.open(model),
            draft,
            progress=progress or Silent(),
            samples=samples,
            max_shard_bytes=shards,
            place=place,
            **choices,
        )
        draft.commit(versions={}, recipe="")
    return target


def rewritten(model: Path, target: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Path:
    """A copy of a model with other values in its tensors."""
    shutil.copytree(model, target)
    for file in target.glob("*.safetensors"):
        save_file({name: change(name, tensor).contiguous() for name, tensor in load_file(file).items()}, file)
    return target


@pytest.fixture(params=["bfloat16", "float16"])
def outlying(request: pytest.FixtureRequest, random_llama: Callable[..., Path], tmp_path: Path) -> Path:
    return with_outliers(random_llama(dtype=request.param), tmp_path)


QWEN2 = {"architecture": "Qwen2ForCausalLM", "vocab_size": 323, "rope_parameters": ROPES["qwen2"]["rope_parameters"]}


@pytest.fixture(params=["untied", "tied"])
def qwen2(request: pytest.FixtureRequest, random_llama: Callable[..., Path], tmp_path: Path) -> Path:
    shape = QWEN2 | {"dtype": "bfloat16", "tie_word_embeddings": request.param == "tied"}
    return with_outliers(random_llama(**shape), tmp_path)


def with_outliers(model: Path, folder: Path) -> Path:
    """A model whose activations differ much between channels, as those of trained models do."""
    generator = torch.Generator().manual_seed(5)

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if "norm" in name:
            return torch.randn(tensor.shape, generator=generator).exp().to(tensor.dtype)
        return tensor * 3 if name.endswith("proj.weight") else tensor

    return rewritten(model, folder / "outlying", change)


def logits_of(made: Path, model: Path, ids: torch.Tensor) -> torch.Tensor:
    """transformers' model with the weights that the written tensors stand for, in float32: folded norms, unfolded
    pre_quant_scales and all, by the format's rules alone."""
    written, restored = tensors_of(made), {}
    for name, tensor in written.items():
        if name.endswith("proj.weight"):
            prefix = name.removesuffix("weight")
            weight = tensor.float() if tensor.dtype != torch.uint8 else nibbles(tensor)
            scale = written[f"{prefix}weight_scale"]
            groups = scale.shape[1] if scale.ndim == 2 else 1
            weight = (weight.view(len(weight), groups, -1) * scale.view(-1, groups, 1)).flatten(1)
            restored[name] = weight * written.get(f"{prefix}pre_quant_scale", torch.tensor(1.0)).float()
        elif name.endswith((".weight", ".bias")):
            restored[name] = tensor.float()
    if "lm_head.weight" not in restored:
        restored["lm_head.weight"] = restored["model.embed_tokens.weight"]
    plain = load(model, torch.float32)
    plain.load_state_dict(restored, strict=True)
    with torch.no_grad():
        found: torch.Tensor = plain(ids.long()).logits
    return found


def nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Low nibble: row 2r, high nibble: row 2r + 1, two's complement."""
    both = torch.stack((packed & 15, packed >> 4), 1).flatten(0, 1).to(torch.int8)
    return torch.where(both > 7, both - 16, both).float()


# --- what it writes --------------------------------------------------------------------------------------------------


def test_awq_and_gptq_give_logits_nearer_to_the_models_than_plain_rounding(outlying: Path, tmp_path: Path) -> None:
    ids = torch.from_numpy(random_samples(8, 64, seed=99).token_ids)
    with torch.no_grad():
        exact = load(outlying, torch.float32)(ids.long()).logits
    plain = run(outlying, tmp_path / "rtn", **INT4)
    errors = {"rtn": float((logits_of(plain, outlying, ids) - exact).norm() / exact.norm())}
    for name, way in WAYS.items():
        made = calibrate(outlying, tmp_path / name, **way)
        errors[name] = float((logits_of(made, outlying, ids) - exact).norm() / exact.norm())
    errors["int8"] = float((logits_of(run(outlying, tmp_path / "int8", weights="int8"), outlying, ids) - exact).norm())
    errors["int8"] /= float(exact.norm())
    assert all(errors[name] < errors["rtn"] for name in WAYS), errors
    assert errors["int8"] < errors["fp8"] < errors["gptq"], errors
    assert errors["int8_sq"] < errors["fp8"], errors


def test_a_qwen2_keeps_its_biases_and_its_logits(qwen2: Path, tmp_path: Path) -> None:
    """Calibrated in each way: biases byte for byte, logits nearer than plain rounding's; without biases far off.

    Errors are large because the fixture's random weights and outliers amplify them: a Llama's are the same (0.62 for
    plain rounding, 0.51 for AWQ and GPTQ, 0.20 for FP8; measured).
    """
    ids = torch.from_numpy(random_samples(8, 64, seed=99).token_ids)
    with torch.no_grad():
        exact = load(qwen2, torch.float32)(ids.long()).logits

    def error(folder: Path) -> float:
        return float((logits_of(folder, qwen2, ids) - exact).norm() / exact.norm())

    source = tensors_of(qwen2)
    biases = {name for name in source if name.endswith(".bias")}
    assert len(biases) == 2 * 3
    plain = error(run(qwen2, tmp_path / "rtn", **INT4))
    for name, way in WAYS.items():
        choices = {**way, "scales": INT4["scales"]} if way is W4A8 else way
        made = calibrate(qwen2, tmp_path / name, **choices)
        written, opened = tensors_of(made), Checkpoint.open(made)
        assert opened.config == Checkpoint.open(qwen2).config
        assert all(torch.equal(written[bias], source[bias]) for bias in biases)
        assert {bias for bias in written if bias.endswith(".bias")} == biases
        assert error(made) < (0.25 if way is FP8 else plain), name
    zeros = rewritten(
        tmp_path / "fp8", tmp_path / "zeros", lambda name, tensor: tensor * 0 if name in biases else tensor
    )
    assert error(zeros) > max(1, plain)


@pytest.mark.parametrize("propagate", ["clean", "quantized"])
def test_a_biased_llama_is_calibrated_behind_its_biases(
    random_llama: Callable[..., Path], tmp_path: Path, propagate: str
) -> None:
    """The statistics of the second layer come from a first one that has all four biases, quantized or not."""
    model = random_llama(dtype="bfloat16", attention_bias=True)
    seen = hooked(load(model, torch.bfloat16), torch.from_numpy(SAMPLES.token_ids))
    made = calibrate(model, tmp_path / "out", **FP8, propagate=propagate)
    layer = json.loads((made / REPORT).read_text())["calibration"]["layers"][1]
    for group, found in layer["groups"].items():
        expected = float(seen[f"model.layers.1.{group}"].abs().max())
        assert found["amax"] == (expected if propagate == "clean" else pytest.approx(expected, rel=0.1))
    assert layer["k_amax"] == pytest.approx(float(seen["model.layers.1.k"].abs().max()), rel=0.05)


def test_awq_keeps_what_the_unrounded_layer_computes(outlying: Path, tmp_path: Path) -> None:
    """Scales that are folded away leave W x as it is: the inputs of the matrices times the stored weights, before and
    after, differ by int4's rounding alone, which the report states, with the scales taken back."""
    made = calibrate(outlying, tmp_path / "out", **WAYS["awq"])
    source, written = tensors_of(outlying), tensors_of(made)
    changed = {
        name for name in source if name in written and "norm" in name and not torch.equal(source[name], written[name])
    }
    report = json.loads((made / REPORT).read_text())
    layers = report["calibration"]["layers"]
    assert [layer["layer"] for layer in layers] == [0, 1]
    for layer, entry in enumerate(layers):
        assert list(entry["groups"]) == [group[0] for group in family.SHARED_INPUT]
        for group in family.SHARED_INPUT:
            found = entry["groups"][group[0]]
            assert 0 <= found["alpha"] <= 1
            assert 0 < found["output_error_after"] <= found["output_error_before"] < 0.3
            for linear in group:
                name = f"{family.linear_name(layer, linear)}"
                own = {suffix: written[f"{name}.{suffix}"] for suffix in ("weight", "weight_scale")}
                by = torch.ones(())
                if f"{name}.pre_quant_scale" in written:
                    by = 1 / written[f"{name}.pre_quant_scale"].float()
                elif linear in family.ATTENTION_IN + family.MLP_IN:
                    norm = family.NORMS[linear in family.MLP_IN]
                    norm = f"model.layers.{layer}.{norm}.weight"
                    by = source[norm].float() / written[norm].float()
                weight = source[f"{name}.weight"].float()
                error = float((restore(own) / by - weight).norm() / weight.norm())
                assert error == pytest.approx(report["relative_error"][name], rel=1e-3)
    assert changed, "no norm took a scale in: this test would show nothing"
    unfolded = {name for name in written if name.endswith("pre_quant_scale")}
    assert unfolded == {
        f"{family.linear_name(layer, linear)}.pre_quant_scale"
        for layer in range(2)
        for linear in ("self_attn.o_proj", "mlp.down_proj")
    }
    assert {written[name].dtype for name in unfolded} == {source["model.norm.weight"].dtype}
    assert json.loads((made / "hf_quant_config.json").read_text())["quantization"]["pre_quant_scale"] is True
    opened = Checkpoint.open(made).quantization
    assert opened is not None
    assert opened.pre_quant_scale


def test_gptq_writes_the_plain_carrier(random_llama: Callable[..., Path], tmp_path: Path) -> None:
    plain, made = (
        run(random_llama(), tmp_path / "rtn", **INT4),
        calibrate(random_llama(), tmp_path / "g", **WAYS["gptq"]),
    )
    ours, theirs = tensors_of(made), tensors_of(plain)
    assert {name: (one.dtype, one.shape) for name, one in ours.items() if not name.endswith("amax")} == {
        name: (one.dtype, one.shape) for name, one in theirs.items()
    }
    documents = [json.loads((folder / "hf_quant_config.json").read_text()) for folder in (made, plain)]
    assert documents[0] == documents[1]


@pytest.mark.parametrize("shape", [{}, QWEN2], ids=["llama", "qwen2"])
@pytest.mark.parametrize("fp8_scales", ["shared", "separate"])
def test_fp8_input_scales_and_kv_scales_are_those_of_transformers_activations(
    random_llama: Callable[..., Path], tmp_path: Path, fp8_scales: str, shape: dict[str, Any]
) -> None:
    model = random_llama(dtype="bfloat16", **shape)
    seen = hooked(load(model, torch.bfloat16), torch.from_numpy(SAMPLES.token_ids))
    made = calibrate(model, tmp_path / "out", **FP8, fp8_scales=fp8_scales)
    written, source = tensors_of(made), tensors_of(model)
    ranges = Checkpoint.open(made).kv_ranges
    assert ranges is not None
    for layer, linear in family.layer_linears(Checkpoint.open(made).config):
        name = family.linear_name(layer, linear)
        assert torch.equal(written[f"{name}.input_scale"], seen[name].abs().max().float() / 448)
        weight = source[f"{name}.weight"]
        if fp8_scales == "separate":
            scale = weight.abs().max().float() / 448
            assert torch.equal(written[f"{name}.weight_scale"], scale)
            twice = (weight / scale).to(torch.float8_e4m3fn)  # rounded to bfloat16 on the way
            assert torch.equal(written[f"{name}.weight"].view(torch.uint8), twice.view(torch.uint8))
    for layer, (key, value) in enumerate(ranges):
        for amax, which in ((key, "k"), (value, "v")):
            assert amax == float(seen[f"model.layers.{layer}.{which}"].abs().max())
            scale = written[f"model.layers.{layer}.self_attn.{which}_proj.{which}_scale"]
            assert float(scale) == (1.0 if fp8_scales == "shared" else pytest.approx(amax / 448, rel=1e-6))
    inside = json.loads((made / "config.json").read_text())["quantization_config"]
    assert inside["config_groups"]["group_0"]["input_activations"]["dynamic"] is False


def test_fp8_kv_scales_grow_with_a_range_beyond_448(random_llama: Callable[..., Path], tmp_path: Path) -> None:
    model = rewritten(
        random_llama(dtype="bfloat16"),
        tmp_path / "model",
        lambda name, tensor: tensor * 5000 if name.endswith("layers.0.self_attn.v_proj.weight") else tensor,
    )
    made = calibrate(model, tmp_path / "out", **FP8)
    ((_, value), _) = Checkpoint.open(made).kv_ranges or []
    assert value > 448
    written = tensors_of(made)
    assert float(written["model.layers.0.self_attn.v_proj.v_scale"]) == pytest.approx(value / 448, rel=1e-6)
    assert float(written["model.layers.0.self_attn.k_proj.k_scale"]) == 1.0


def test_smoothquant_balances_each_input_once_and_stores_how(random_llama: Callable[..., Path], tmp_path: Path) -> None:
    model = random_llama(dtype="bfloat16")
    seen = hooked(load(model, torch.bfloat16), torch.from_numpy(SAMPLES.token_ids))
    made = calibrate(model, tmp_path / "out", **SQ)
    written, source = tensors_of(made), tensors_of(model)
    for layer in range(2):
        for group in family.SHARED_INPUT:
            names = [family.linear_name(layer, linear) for linear in group]
            channel_amax = seen[names[0]].flatten(0, -2).abs().amax(0).float()
            by = written[f"{names[0]}.pre_quant_scale"]
            assert by.dtype == torch.bfloat16
            wanted = [source[f"{name}.weight"].float().abs().amax(0).div(channel_amax).sqrt() for name in names]
            torch.testing.assert_close(by.float(), torch.stack(wanted).mean(0), rtol=2**-6, atol=0)
            largest = (seen[names[0]] * by).abs().max().float()
            for name in names:
                assert torch.equal(written[f"{name}.pre_quant_scale"], by)
                assert torch.equal(written[f"{name}.input_scale"], largest / 127)
                smoothed = source[f"{name}.weight"].double() / by.double()
                scale = smoothed.abs().amax(1) / 127
                torch.testing.assert_close(written[f"{name}.weight_scale"].double(), scale, rtol=1e-6, atol=0)
                codes = torch.round(smoothed / scale[:, None])
                assert (codes - written[f"{name}.weight"].double()).abs().max() <= 1  # a tie may go the other way
                assert float((codes != written[f"{name}.weight"].double()).float().mean()) < 1e-3
    norms = [name for name in source if "norm" in name]
    assert all(torch.equal(written[name], source[name]) for name in norms)
    report = json.loads((made / REPORT).read_text())
    assert report["smoothquant_alpha"] == 0.5
    for layer in report["calibration"]["layers"]:
        for found in layer["groups"].values():
            assert found["alpha"] == 0.5
            assert 0 < found["output_error_after"] < 0.1
    document = json.loads((made / "hf_quant_config.json").read_text())["quantization"]
    excluded = ["lm_head", "model.embed_tokens"]
    assert document == {
        "quant_algo": "W8A8_SQ_PER_CHANNEL",
        "kv_cache_quant_algo": None,
        "exclude_modules": excluded,
    }


def test_smoothquant_keeps_outlier_channels_from_spoiling_the_inputs(outlying: Path, tmp_path: Path) -> None:
    report = json.loads((calibrate(outlying, tmp_path / "out", **SQ) / REPORT).read_text())
    groups = [group for layer in report["calibration"]["layers"] for group in layer["groups"].values()]
    before, after = (sum(group[f"output_error_{when}"] for group in groups) for when in ("before", "after"))
    assert after < 0.8 * before


def test_w4a8_is_awq_with_a_second_scale_and_that_of_the_input(outlying: Path, tmp_path: Path) -> None:
    four = tensors_of(calibrate(outlying, tmp_path / "int4", **{**W4A8, "weights": "int4", "method": "awq"}))
    made = calibrate(outlying, tmp_path / "out", **W4A8)
    written, source = tensors_of(made), tensors_of(outlying)
    added = {name for name in written if name.endswith(("weight_scale_2", "input_scale"))}
    assert set(written) - added == set(four)
    assert all(torch.equal(written[name], four[name]) for name in four), "the int4 part is AWQ's"
    seen = hooked(load(outlying, torch.bfloat16), torch.from_numpy(SAMPLES.token_ids))
    for layer in range(2):
        for group in family.SHARED_INPUT:
            names = [family.linear_name(layer, linear) for linear in group]
            second = max(written[f"{name}.weight_scale"].max() for name in names) / 64
            by = written.get(f"{names[0]}.pre_quant_scale")
            if by is None:
                norm = f"model.layers.{layer}.{family.NORMS[group == family.MLP_IN]}.weight"
                by = written[norm].float() / source[norm].float()
            largest = float((seen[names[0]].flatten(0, -2).abs().amax(0).float() * by.float()).max())
            for name in names:
                assert torch.equal(written[f"{name}.weight_scale_2"], second)
                assert float(written[f"{name}.input_scale"]) == pytest.approx(largest / 448, rel=2**-6)
    document = json.loads((made / "hf_quant_config.json").read_text())["quantization"]
    assert (document["quant_algo"], document["group_size"], document["pre_quant_scale"]) == ("W4A8_AWQ", 128, True)
    assert json.loads((made / REPORT).read_text())["method"] == "awq"


@pytest.mark.parametrize("kv", ["int8", "fp8"])
def test_weights_that_stay_get_ranges_of_keys_and_values(
    random_llama: Callable[..., Path], tmp_path: Path, kv: str
) -> None:
    model = random_llama(dtype="bfloat16")
    seen = hooked(load(model, torch.bfloat16), torch.from_numpy(SAMPLES.token_ids))
    made = calibrate(model, tmp_path / "out", **{**INT4, "weights": "none", "kv": kv})
    ranges = Checkpoint.open(made).kv_ranges
    assert ranges == [
        (float(seen[f"model.layers.{layer}.k"].abs().max()), float(seen[f"model.layers.{layer}.v"].abs().max()))
        for layer in range(2)
    ]
    files = {path.name for path in made.iterdir()}
    assert not {name for name in files if name.startswith("hidden")}
    digests(made)
    again = run(made, tmp_path / "again", weights="none", kv=kv)
    assert Checkpoint.open(again).kv_ranges == ranges


@pytest.mark.parametrize("way", ["awq", "int8_sq", "int4_fp8"])
def test_a_quantized_checkpoint_is_observed_as_what_its_codes_stand_for(
    outlying: Path, tmp_path: Path, way: str
) -> None:
    first = calibrate(outlying, tmp_path / "first", **WAYS[way])
    made = calibrate(first, tmp_path / "second", **{**WAYS[way], "kv": "int8"})
    same = tensors_of(first)
    assert all(torch.equal(tensor, same[name]) for name, tensor in tensors_of(made).items())
    ranges, earlier = Checkpoint.open(made).kv_ranges, Checkpoint.open(first).kv_ranges
    assert ranges is not None
    assert earlier is not None
    assert ranges != earlier
    for (key, value), (other_key, other_value) in zip(ranges, earlier, strict=True):
        assert key == pytest.approx(other_key, rel=0.2)
        assert value == pytest.approx(other_value, rel=0.2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda layers: [layers[0], {**layers[1], "k_amax": float("nan")}], "not a number"),
        (lambda layers: layers[1:], "holds 1 layers"),
        (lambda layers: [layers[0], {"k_amax": 1.0}], "a k_amax and v_amax for each layer"),
    ],
    ids=["nan", "a layer missing", "a range missing"],
)
def test_damaged_ranges_are_refused_by_the_files_name(
    random_llama: Callable[..., Path],
    tmp_path: Path,
    change: Callable[[list[dict[str, float]]], list[dict[str, float]]],
    message: str,
) -> None:
    made = calibrate(random_llama(), tmp_path / "out", **FP8)
    file = made / KV_RANGES
    file.write_text(json.dumps({"layers": change(json.loads(file.read_text())["layers"])}))
    with pytest.raises(ArtifactError, match=message) as caught:
        _ = Checkpoint.open(made).kv_ranges
    assert str(file) in caught.value.message


# --- refusals --------------------------------------------------------------------------------------------------------


def test_a_method_that_needs_text_is_refused_without_it(random_llama: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="method: awq needs text"):
        calibrate(random_llama(), tmp_path / "out", samples=None, **WAYS["awq"])


@pytest.mark.parametrize("weights", ["int8_sq", "int4_fp8"])
def test_weights_that_depend_on_text_are_refused_without_it(
    random_llama: Callable[..., Path], tmp_path: Path, weights: str
) -> None:
    with pytest.raises(PlanError, match=f"weights: {weights} needs text") as caught:
        calibrate(random_llama(), tmp_path / "out", samples=None, **{**SQ, "weights": weights})
    assert "calibration: {data: builtin}" in caught.value.hint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("way", ["awq", "gptq", "fp8", "int8_sq", "int4_fp8"])
@pytest.mark.parametrize("linear", ["self_attn.v_proj", "mlp.down_proj"])
def test_nan_in_the_weights_is_said_of_the_weights(
    random_llama: Callable[..., Path], tmp_path: Path, way: str, linear: str
) -> None:
    name = f"model.layers.1.{linear}.weight"

    def spoil(which: str, tensor: torch.Tensor) -> torch.Tensor:
        if which == name:
            tensor[-1, -1] = float("nan")
        return tensor

    model = rewritten(random_llama(), tmp_path / "model", spoil)
    with pytest.raises(ArtifactError, match="this model is damaged") as caught:
        calibrate(model, tmp_path / "out", **WAYS[way])
    assert name in caught.value.message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("way", ["rtn", "awq", "fp8"])
def test_nan_in_a_bias_is_said_of_the_bias(random_llama: Callable[..., Path], tmp_path: Path, way: str) -> None:
    name = "model.layers.1.self_attn.k_proj.bias"

    def spoil(which: str, tensor: torch.Tensor) -> torch.Tensor:
        if which == name:
            tensor[-1] = float("nan")
        return tensor

    model = rewritten(random_llama(**QWEN2), tmp_path / "model", spoil)
    choices = {"samples": None, **INT4} if way == "rtn" else WAYS[way]
    with pytest.raises(ArtifactError, match="this model is damaged") as caught:
        calibrate(model, tmp_path / "out", **choices)
    assert name in caught.value.message
    assert not (tmp_path / "out").exists()


def test_activations_that_overflow_name_layer_and_place(random_llama: Callable[..., Path], tmp_path: Path) -> None:
    def swell(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return (
            tensor * 1e24 if name.endswith(("layers.1.mlp.gate_proj.weight", "layers.1.mlp.up_proj.weight")) else tensor
        )

    model = rewritten(random_llama(dtype="bfloat16"), tmp_path / "model", swell)
    with pytest.raises(ArtifactError, match=r"input of mlp\.down_proj of layer 1, with finite weights") as caught:
        calibrate(model, tmp_path / "out", **WAYS["awq"])
    assert "overflows bfloat16" in caught.value.message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("step", ["embeddings", "layer 2 of 3"])
def test_a_disk_that_is_full_for_the_hidden_states_is_said_and_work_goes_on_after_room_is_made(
    random_llama: Callable[..., Path], tmp_path: Path, step: str
) -> None:
    """A limit on the size of files stands for the full disk; only the hidden states reach it."""
    model, samples = random_llama(num_hidden_layers=3, dtype="bfloat16"), random_samples(96, 64)
    whole = digests(calibrate(model, tmp_path / "whole", samples=samples, max_shard_bytes=1, **WAYS["awq"]))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(text: str) -> None:
        if text == step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))

    target = tmp_path / "out"
    try:
        with pytest.raises(ArtifactError, match=r"hidden-states-\d+\.bin: File too large .*MiB free") as caught:
            calibrate(model, target, Listening(fill), samples=samples, max_shard_bytes=1, **WAYS["awq"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "Make room" in caught.value.hint
    assert not target.exists()
    heard = Listening()
    assert digests(calibrate(model, target, heard, samples=samples, max_shard_bytes=1, **WAYS["awq"])) == whole
    assert heard.said[0] == step


# --- interruptions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_an_interruption_before_any_layer_resumes_to_the_same_bytes(
    random_llama: Callable[..., Path], tmp_path: Path, way: str
) -> None:
    model = random_llama(num_hidden_layers=3, dtype="bfloat16")
    whole = digests(calibrate(model, tmp_path / "whole", **WAYS[way]))
    assert KV_RANGES in whole
    steps = ["embeddings", *(f"layer {number} of 3" for number in range(1, 4)), "head"]
    for place, step in enumerate(steps):

        def interrupt(text: str, step: str = step) -> None:
            if text == step:
                raise KeyboardInterrupt

        target = tmp_path / step.replace(" ", "-")
        with pytest.raises(KeyboardInterrupt):
            calibrate(model, target, Listening(interrupt), **WAYS[way])
        heard = Listening()
        assert digests(calibrate(model, target, heard, **WAYS[way])) == whole
        # The journal of the unit before it may still have been in the writer's hands.
        assert heard.said[0] in steps[max(0, place - 1) : place + 1]
        assert heard.advanced["quantize"] == heard.totals["quantize"]


CHILD = """
import sys, time
from pathlib import Path
from tests.stages.test_quantize import Listening
from tests.stages.test_quantize_calibrated import WAYS, calibrate
model, target, way = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
calibrate(model, target, Listening(lambda text: time.sleep(1.0)), max_shard_bytes=1, **WAYS[way])
"""


@pytest.mark.parametrize("way", ["awq", "gptq", "int8_sq"])
def test_kill_9_loses_only_the_layer_in_hand(
    random_llama: Callable[..., Path], tmp_path: Path, root: Path, way: str
) -> None:
    model = random_llama(num_hidden_layers=4)
    whole = digests(calibrate(model, tmp_path / "whole", max_shard_bytes=1, **WAYS[way]))
    target = tmp_path / "killed"
    command = [sys.executable, "-c", CHILD, str(model), str(target), way]
    child = subprocess.Popen(command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, stderr=subprocess.PIPE)
    try:
        journal: list[dict[str, Any]] = []
        deadline = time.monotonic() + 120
        while len(journal) < 3:
            assert child.poll() is None, child.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
            for file in tmp_path.glob("killed.partial-*/journal.jsonl"):
                journal = [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    (partial,) = tmp_path.glob("killed.partial-*")
    before = {entry["file"]: (partial / entry["file"]).stat().st_mtime_ns for entry in journal}
    heard = Listening()
    assert digests(calibrate(model, target, heard, max_shard_bytes=1, **WAYS[way])) == whole
    assert heard.said[0] == f"layer {len(journal)} of 4"
    assert {name: (target / name).stat().st_mtime_ns for name in before} == before


@pytest.mark.parametrize("damage", ["lost", "changed"])
def test_lost_hidden_states_begin_the_work_again(
    random_llama: Callable[..., Path], tmp_path: Path, damage: str
) -> None:
    model = random_llama(num_hidden_layers=3, dtype="bfloat16")
    whole = digests(calibrate(model, tmp_path / "whole", **WAYS["fp8"]))

    def interrupt(text: str) -> None:
        if text == "layer 3 of 3":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, tmp_path / "out", Listening(interrupt), **WAYS["fp8"])
    kept = list(tmp_path.glob("out.partial-*/hidden-states-*"))
    assert 1 <= len(kept) <= 3
    for file in kept:
        if damage == "lost":
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[::-1])
    heard = Listening()
    assert digests(calibrate(model, tmp_path / "out", heard, **WAYS["fp8"])) == whole
    assert heard.said[0] == "embeddings"
    assert any("begins again" in note for note in heard.notes)


def test_progress_counts_every_input_byte(random_llama: Callable[..., Path], tmp_path: Path) -> None:
    heard = Listening()
    calibrate(random_llama(), tmp_path / "out", heard, **WAYS["awq"])
    assert heard.totals == heard.advanced == {"quantize": Checkpoint.open(random_llama()).nbytes}
