"""Checkpoints: opened without loading, refused by the name of the file that is at fault."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.quantizers.calibrated import ROPES
from toolchain import checkpoint as module
from toolchain.checkpoint import Checkpoint
from toolchain.errors import ArtifactError, PlanError

INDEX = "model.safetensors.index.json"


@pytest.fixture
def model(random_llama: Callable[..., Path], tmp_path: Path) -> Path:
    """A sharded model of our own, to be damaged."""
    return shutil.copytree(random_llama(), tmp_path / "model")


@pytest.fixture
def single(model: Path) -> Path:
    """The same in one file, without an index."""
    values = {name: tensor for file in model.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for old in [*model.glob("*.safetensors"), model / INDEX]:
        old.unlink()
    save_file(values, model / "model.safetensors")
    return model


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    values = load_file(file)
    change(values)
    save_file(values, file)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", [{}, {"dtype": "bfloat16"}, {"tie_word_embeddings": True, "dtype": "float32"}])
def test_every_tensor_is_the_one_that_safetensors_reads(
    random_llama: Callable[..., Path], overrides: dict[str, Any]
) -> None:
    folder = random_llama(**overrides)
    opened = Checkpoint.open(folder)
    expected = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert set(opened.tensors) == set(expected)
    assert opened.nbytes == sum(tensor.nbytes for tensor in expected.values())
    assert opened.quantization is None
    for name, tensor in expected.items():
        assert opened.tensors[name].shape == tuple(tensor.shape)
        assert np.array_equal(opened.bytes_of(name), tensor.reshape(-1).view(torch.uint8).numpy())
        assert not opened.bytes_of(name).flags.writeable


def test_one_file_without_an_index_is_the_same_model(single: Path, random_llama: Callable[..., Path]) -> None:
    one, many = Checkpoint.open(single), Checkpoint.open(random_llama())
    assert set(one.tensors) == set(many.tensors)
    assert all(np.array_equal(one.bytes_of(name), many.bytes_of(name)) for name in one.tensors)


def resident_bytes() -> int:
    fields = Path("/proc/self/smaps_rollup").read_text()
    return 1024 * int(next(line.split()[1] for line in fields.splitlines() if line.startswith("Rss:")))


def test_release_gives_the_pages_back_and_views_stay_good(random_llama: Callable[..., Path]) -> None:
    opened = Checkpoint.open(random_llama(num_hidden_layers=1, hidden_size=1024, vocab_size=16384))
    name = "model.embed_tokens.weight"
    view = opened.bytes_of(name)
    before, total = resident_bytes(), int(view.sum(dtype=np.int64))
    touched = resident_bytes()
    assert touched - before > 0.8 * view.nbytes
    opened.release(name)
    assert resident_bytes() - before < 0.2 * view.nbytes
    assert int(view.sum(dtype=np.int64)) == total


def test_release_of_a_tensor_that_was_never_read_does_nothing(model: Path) -> None:
    Checkpoint.open(model).release("model.norm.weight")


def test_side_files_are_the_ones_that_travel(model: Path) -> None:
    (model / "tokenizer.model").write_bytes(b"x")
    (model / "README.md").write_text("x")
    names = {file.name for file in Checkpoint.open(model).side_files}
    assert {"tokenizer.model", "generation_config.json"} <= names
    assert "README.md" not in names
    assert "config.json" not in names


def test_fingerprints_change_with_weights_configuration_and_tokenizer(model: Path) -> None:
    prints = [Checkpoint.open(model).fingerprint]

    def again() -> None:
        prints.append(Checkpoint.open(model).fingerprint)

    rewrite(sorted(model.glob("*.safetensors"))[0], lambda values: [tensor.mul_(1.01) for tensor in values.values()])
    again()
    edit(model / "config.json", rms_norm_eps=1e-4)
    again()
    (model / "tokenizer_config.json").write_text('{"changed": 1}')
    again()
    assert len(set(prints)) == 4
    assert Checkpoint.open(shutil.copytree(model, model.with_name("copy"))).fingerprint == prints[-1]


@pytest.mark.parametrize(
    ("config", "generation", "ids"),
    [
        (2, None, (2,)),
        (2, 2, (2,)),
        (151645, [151645, 151643], (151645, 151643)),
        ([4, 5], None, (4, 5)),
        (None, [7, 8], (7, 8)),
        (None, None, ()),
    ],
)
def test_end_ids_are_the_generation_configs_where_it_names_any(
    model: Path, config: object, generation: object, ids: tuple[int, ...]
) -> None:
    """As transformers' generate() has it; Qwen2.5-7B-Instruct is the third."""
    edit(model / "config.json", eos_token_id=config)
    edit(model / "generation_config.json", eos_token_id=generation)
    assert Checkpoint.open(model).config.eos_token_ids == ids
    (model / "generation_config.json").unlink()
    expected = Checkpoint.open(model).config.eos_token_ids
    assert expected == (() if config is None else tuple(config) if isinstance(config, list) else (config,))


@pytest.mark.parametrize("shape", ["biased", "mistral", "qwen2", "qwen2-tied"])
def test_models_of_the_family_are_opened_with_their_biases(random_llama: Callable[..., Path], shape: str) -> None:
    opened = Checkpoint.open(random_llama(**ROPES[shape]))
    expected = {f"model.layers.{layer}.{linear}.bias" for layer in range(2) for linear in opened.config.biased}
    assert {name for name in opened.tensors if name.endswith(".bias")} == expected
    assert len(expected) == {"biased": 8, "mistral": 0}.get(shape, 6)
    assert ("lm_head.weight" in opened.tensors) is (shape != "qwen2-tied")


# --- refusals --------------------------------------------------------------------------------------------------------


def refused(folder: Path, *words: object, kind: type[Exception] = ArtifactError) -> Any:
    with pytest.raises(kind) as caught:
        Checkpoint.open(folder)
    for word in words:
        assert str(word) in str(caught.value)
    return caught.value


@pytest.mark.parametrize("cut", [1, 1000, -9, -100])
def test_a_truncated_file_is_named(model: Path, cut: int) -> None:
    """Cut off at the end (positive), or to its first few bytes (negative)."""
    victim = sorted(model.glob("*.safetensors"))[1]
    os.truncate(victim, victim.stat().st_size - cut if cut > 0 else -cut)
    refused(model, victim)


def test_an_empty_and_an_overlong_file_are_named(model: Path) -> None:
    victim = sorted(model.glob("*.safetensors"))[1]
    with victim.open("ab") as stream:
        stream.write(b"x")
    refused(model, victim, "longer than it should be")
    victim.write_bytes(b"")
    refused(model, victim, "not a safetensors file")


@pytest.mark.parametrize(
    "header",
    [
        b"not json at all",
        b'"text"',
        b"[1]",
        b'{"x": 1}',
        b'{"x": {"dtype": "F16", "shape": [2]}}',
        b'{"x": {"dtype": "Q4", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"x": {"dtype": "F16", "shape": [3], "data_offsets": [0, 4]}}',
        b'{"x": {"dtype": "F16", "shape": [2], "data_offsets": [-4, 0]}}',
        b'{"x": {"dtype": "F16", "shape": [2], "data_offsets": [0.0, 4.0]}}',
        b'{"x": {"dtype": "F16", "shape": [-1, -2], "data_offsets": [0, 4]}}',
        b'{"x": {"dtype": "F16", "shape": "2", "data_offsets": [0, 4]}}',
        b"\xff\xfe",
    ],
)
def test_a_wrong_header_is_named(single: Path, header: bytes) -> None:
    file = single / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    refused(single, file)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60), st.booleans())
def test_no_bytes_at_all_make_a_header_crash(tmp_path: Path, data: bytes, framed: bool) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(data).to_bytes(8, "little") + data if framed else data)
    with suppress(ArtifactError):
        module.read_header(file)


def test_a_missing_shard_is_named(model: Path) -> None:
    victim = sorted(model.glob("*.safetensors"))[0]
    victim.unlink()
    refused(model, victim, "no such file")


def test_a_missing_tensor_is_named(single: Path) -> None:
    rewrite(single / "model.safetensors", lambda values: values.pop("model.layers.1.mlp.up_proj.weight"))
    refused(single, "1 tensors are missing", "model.layers.1.mlp.up_proj.weight")


def test_a_wrong_shape_is_named_with_both_shapes(single: Path) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    rewrite(single / "model.safetensors", lambda values: values.update({name: torch.zeros(64, 256).half()}))
    refused(single, single / "model.safetensors", name, "[64, 256]", "[128, 256]")


def test_a_wrong_dtype_is_named(single: Path) -> None:
    name = "model.norm.weight"
    rewrite(single / "model.safetensors", lambda values: values.update({name: torch.zeros(256, dtype=torch.int8)}))
    refused(single, name, "I8")


def test_tensors_that_a_llama_does_not_have_are_refused(single: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.bias"
    rewrite(single / "model.safetensors", lambda values: values.update({name: torch.zeros(256).half()}))
    refused(single, name, kind=PlanError)


@pytest.mark.parametrize("change", ["missing", "short", "integers", "one too many"])
def test_biases_are_held_to_the_configuration(random_llama: Callable[..., Path], tmp_path: Path, change: str) -> None:
    model = shutil.copytree(random_llama(**ROPES["qwen2"]), tmp_path / "qwen2")
    name = "model.layers.0.self_attn.k_proj.bias"
    file = next(file for file in model.glob("*.safetensors") if name in load_file(file))
    index = json.loads((model / INDEX).read_text())
    if change == "missing":
        rewrite(file, lambda values: values.pop(name))
        del index["weight_map"][name]
        (model / INDEX).write_text(json.dumps(index))
        refused(model, "1 tensors are missing", name)
    elif change == "short":
        rewrite(file, lambda values: values.update({name: values[name][:64].clone()}))
        refused(model, file, name, "[64]", "[128]")
    elif change == "integers":
        rewrite(file, lambda values: values.update({name: torch.zeros(128, dtype=torch.int8)}))
        refused(model, file, name, "I8")
    else:
        other = name.replace("k_proj", "o_proj")
        rewrite(file, lambda values: values.update({other: torch.zeros(256).half()}))
        index["weight_map"][other] = file.name
        (model / INDEX).write_text(json.dumps(index))
        refused(model, other, "Qwen2ForCausalLM", kind=PlanError)


@pytest.mark.parametrize("eos", ["</s>", [1, None], {"id": 2}])
def test_end_ids_that_are_no_numbers_are_refused_by_the_files_name(model: Path, eos: object) -> None:
    edit(model / "generation_config.json", eos_token_id=eos)
    refused(model, model / "generation_config.json", "eos_token_id")


def test_an_index_that_lies_is_refused(model: Path) -> None:
    index = json.loads((model / INDEX).read_text())
    index["weight_map"]["model.layers.9.extra"] = next(iter(index["weight_map"].values()))
    (model / INDEX).write_text(json.dumps(index))
    refused(model, "the index promises tensors that no file has", "model.layers.9.extra")
    (model / INDEX).write_text('{"metadata": {}}')
    refused(model, model / INDEX, "weight_map")
    (model / INDEX).write_text("{")
    refused(model, model / INDEX, "not readable as JSON")


def test_an_index_that_hides_a_tensor_or_misplaces_one_is_refused(model: Path) -> None:
    index = json.loads((model / INDEX).read_text())
    name = "model.layers.1.mlp.up_proj.weight"
    places = dict(index["weight_map"])
    other = next(file for file in places.values() if file != places[name])
    (model / INDEX).write_text(json.dumps({**index, "weight_map": {**places, name: other}}))
    refused(model, model / INDEX, f"says that {name} is in {other}, and it is in {places[name]}")
    del places[name]
    (model / INDEX).write_text(json.dumps({**index, "weight_map": places}))
    if any(file == index["weight_map"][name] for file in places.values()):
        refused(model, model / INDEX, "does not name tensors that", index["weight_map"][name], name)
    else:  # the only one in its file, which nobody reads then
        refused(model, "1 tensors are missing", name)


def test_a_tensor_beside_those_that_the_index_names_is_refused(model: Path) -> None:
    index = json.loads((model / INDEX).read_text())
    file = model / index["weight_map"]["model.norm.weight"]
    rewrite(file, lambda values: values.update({"model.hidden.weight": torch.zeros(4).half()}))
    refused(model, model / INDEX, "does not name tensors", file.name, "model.hidden.weight")


def test_pickled_weights_alone_are_refused_with_the_command_that_converts_them(single: Path) -> None:
    (single / "model.safetensors").rename(single / "pytorch_model.bin")
    hint = refused(single, single, "pickled weights, which can run code").hint
    assert f"scalellm import {single} OUT" in hint


def test_a_folder_without_weights_or_configuration_is_refused(single: Path) -> None:
    (single / "model.safetensors").unlink()
    refused(single, "has no model.safetensors")
    (single / "config.json").unlink()
    refused(single, single / "config.json", "no such file")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"architectures": ["GraniteForCausalLM"]}, "GraniteForCausalLM"),
        ({"logits_scaling": 8.0}, "logits_scaling: 8.0"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"hidden_act": "gelu"}, "gelu"),
    ],
)
def test_models_that_we_would_compute_wrongly_are_refused(model: Path, changes: dict[str, Any], word: str) -> None:
    edit(model / "config.json", **changes)
    refused(model, word, kind=PlanError)


def test_layouts_that_we_do_not_read_are_refused(model: Path) -> None:
    file = model / "hf_quant_config.json"
    file.write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    refused(model, file, "NVFP4", kind=PlanError)
    file.write_text(json.dumps({"quantization": {"quant_algo": "W4A16_AWQ", "has_zero_point": True}}))
    refused(model, file, "zero points", kind=PlanError)


def test_a_config_that_promises_quantized_weights_is_held_to_it(model: Path) -> None:
    (model / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    refused(model, "weight_scale")


@pytest.mark.parametrize("algo", ["W8A16", "W8A8_SQ_PER_CHANNEL", "W4A8_AWQ"])
def test_each_quantization_is_held_to_its_own_tensors(model: Path, algo: str) -> None:
    (model / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": algo, "group_size": 128}}))
    refused(model, "weight_scale" if algo == "W8A16" else "input_scale", "missing")


def test_int8_weights_without_what_balances_their_input_are_refused(single: Path) -> None:
    """Read without it, they would be computed wrongly."""
    (single / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "W8A8_SQ_PER_CHANNEL"}}))
    gone = "model.layers.1.mlp.up_proj.pre_quant_scale"

    def quantize(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("proj.weight")]:
            prefix, (rows, columns) = name.removesuffix("weight"), tensors[name].shape
            tensors[name] = torch.ones(rows, columns, dtype=torch.int8)
            tensors |= {f"{prefix}weight_scale": torch.ones(rows), f"{prefix}input_scale": torch.ones(())}
            tensors[f"{prefix}pre_quant_scale"] = torch.ones(columns, dtype=torch.float16)

    rewrite(single / "model.safetensors", quantize)
    found = Checkpoint.open(single).quantization
    assert found is not None
    assert found.quant_algo == "W8A8_SQ_PER_CHANNEL"
    rewrite(single / "model.safetensors", lambda tensors: tensors.pop(gone))
    refused(single, gone)
