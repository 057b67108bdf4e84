"""The arithmetic of scripts/bench_quality.py and scripts/reference_llama.py against formulas written out in numpy."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

SCRIPTS = Path(__file__).parents[1] / "scripts"

Array = npt.NDArray[np.float64]


@pytest.fixture(scope="module", autouse=True)
def scripts_on_path() -> Iterator[None]:
    sys.path.insert(0, str(SCRIPTS))
    yield
    sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def bench(scripts_on_path: None) -> Any:
    return importlib.import_module("bench_quality")


@pytest.fixture(scope="module")
def reference(scripts_on_path: None) -> Any:
    return importlib.import_module("reference_llama")


def e4m3(x: Array) -> Array:
    """Three bits behind the point, smallest exponent -6, largest number 448, ties to even (OCP OFP8 1.0)."""
    exponent = np.maximum(np.floor(np.log2(np.maximum(np.abs(x), 1e-30))), -6)
    step = 2.0 ** (exponent - 3)
    return np.clip(np.rint(x / step) * step, -448, 448)


def spread(seed: int = 0) -> Array:
    """Numbers of every size, some beyond every range, zero and ties among them."""
    random = np.random.default_rng(seed)
    sizes = random.standard_normal(4000) * 10.0 ** random.uniform(-4, 3, 4000)
    return np.concatenate([sizes, [0.0, 1.0625, 1.1875, -1.0625, 448.0, 464.0, 480.0, -1e6, 2**-9, 2**-10]])


@pytest.mark.parametrize("scale", [1.0, 0.03125, 2.0])
def test_fp8_rounding_is_that_of_the_ofp8_specification(reference: Any, scale: float) -> None:
    x = spread()
    given = reference.round_e4m3(torch.from_numpy(x).float(), scale).double().numpy()
    np.testing.assert_array_equal(given, e4m3(x.astype(np.float32).astype(np.float64) / scale) * scale)


def test_int8_rounding_is_to_nearest_and_clamped(reference: Any) -> None:
    x = spread(1).astype(np.float32)
    given = reference.round_int8(torch.from_numpy(x), 0.25).numpy()
    np.testing.assert_array_equal(given, np.clip(np.rint(x / 0.25), -128, 127) * 0.25)


def test_int4_nibbles_are_the_rows_of_a_pair(reference: Any) -> None:
    codes = np.random.default_rng(2).integers(-8, 8, (6, 5))
    packed = ((codes[0::2] & 15) | ((codes[1::2] & 15) << 4)).astype(np.uint8)
    np.testing.assert_array_equal(reference.unpack_int4(torch.from_numpy(packed)).numpy(), codes)


def test_an_int4_weight_has_one_scale_for_each_group_and_w4a8_rounds_it_to_fp8(reference: Any) -> None:
    random = np.random.default_rng(3)
    codes, scale = random.integers(-8, 8, (4, 8)), random.uniform(0.5, 2, (4, 2)).astype(np.float32)
    packed = ((codes[0::2] & 15) | ((codes[1::2] & 15) << 4)).astype(np.uint8)
    tensors = {"weight": torch.from_numpy(packed), "weight_scale": torch.from_numpy(scale)}
    whole = codes * np.repeat(scale, 4, axis=1)
    np.testing.assert_allclose(reference.dequantize(tensors).numpy(), whole, rtol=1e-6)
    eight = reference.dequantize(tensors | {"weight_scale_2": torch.tensor(0.25)}).numpy()
    np.testing.assert_allclose(eight, e4m3(whole / 0.25) * 0.25, rtol=1e-6)
    assert not np.allclose(eight, whole, rtol=1e-3)


def test_engines_have_one_kv_scale_a_layer_and_fp8_none_below_one(reference: Any) -> None:
    x, ranges = torch.from_numpy(spread(4)).float(), [(30.0, 2.0), (3000.0, 900.0)]
    for layer, (key, value) in enumerate(reference.kv_rounding("int8", ranges)):
        scale = max(ranges[layer]) / 127
        expected = np.clip(np.rint(x.numpy() / np.float32(scale)), -128, 127) * np.float32(scale)
        np.testing.assert_allclose(key(x).numpy(), expected, rtol=1e-6)
        assert torch.equal(key(x), value(x))
    (key, _), (far, _) = reference.kv_rounding("fp8", ranges)
    np.testing.assert_array_equal(key(x).numpy(), e4m3(x.double().numpy()).astype(np.float32))
    assert float(far(torch.tensor(3000.0))) == 3000.0
    assert float(key(torch.tensor(3000.0))) == 448.0
    two_keys, two_values = reference.kv_rounding("int8-two", ranges)[0]
    assert float(two_keys(torch.tensor(100.0))) == pytest.approx(30.0)
    assert float(two_values(torch.tensor(100.0))) == pytest.approx(2.0)
    assert reference.kv_rounding("fp16", ranges) == []


def test_the_standard_error_of_equal_sequences_is_the_textbooks(bench: Any) -> None:
    sums = np.random.default_rng(5).uniform(10, 30, 40)
    mean, error = bench.mean_and_error(list(sums), [10] * 40)
    assert mean == pytest.approx(sums.mean() / 10)
    assert error == pytest.approx(sums.std(ddof=1) / math.sqrt(40) / 10)


def test_the_standard_error_of_unequal_sequences_is_what_resampling_them_gives(bench: Any) -> None:
    random = np.random.default_rng(6)
    counts = random.integers(40, 500, 120)
    sums = counts * random.normal(3, 0.5, 120)
    chosen = random.integers(0, 120, (4000, 120))
    resampled = sums[chosen].sum(1) / counts[chosen].sum(1)
    assert bench.mean_and_error(list(sums), list(counts))[1] == pytest.approx(resampled.std(), rel=0.05)


def test_pairs_separate_what_perplexities_alone_do_not(bench: Any) -> None:
    random = np.random.default_rng(7)
    counts, plain = [100] * 50, random.normal(300, 60, 50)
    other = plain + random.normal(1.0, 0.5, 50)
    mean, error = bench.paired(list(other), list(plain), counts)
    assert mean == pytest.approx(0.01, abs=0.003)
    assert error < bench.mean_and_error(list(plain), counts)[1] / 20
    assert bench.paired(list(plain), list(plain), counts) == (0.0, 0.0)


def test_methods_are_compared_with_plain_rounding_of_the_same_groups_and_scales(bench: Any) -> None:
    names = ["int4-rtn-mse", "int4-rtn-mse:g64", "int4-awq-mse:g64", "int4-awq-mse:g64:quantized", "fp8"]
    pairs = bench.comparisons(names)
    assert ("int4-awq-mse:g64", "int4-rtn-mse:g64") in pairs
    assert ("int4-awq-mse:g64:quantized", "int4-awq-mse:g64") in pairs
    assert ("int4-awq-mse:g64:quantized", "int4-rtn-mse:g64") in pairs
    assert ("int4-rtn-mse:g64", "int4-rtn-mse") in pairs
    assert ("int4-awq-mse:g64", "int4-rtn-mse") not in pairs


def test_the_reference_gives_the_logits_of_the_arithmetic_written_out(reference: Any, tmp_path: Path) -> None:
    """int8 with a smoothed, rounded input in one linear: the hook treats it before the matrix product."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=64, num_key_value_heads=1, tie_word_embeddings=False, **sizes)
    model = LlamaForCausalLM(config).eval()
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    name = "model.layers.0.mlp.down_proj."
    weight, factor = tensors[f"{name}weight"], torch.rand(128) + 0.5
    scale = (weight / factor).abs().amax(1) / 127
    code = (weight / factor / scale[:, None]).round().to(torch.int8)
    stored = {"weight": code, "weight_scale": scale, "pre_quant_scale": factor, "input_scale": torch.tensor(0.001)}
    save_file(tensors | {f"{name}{suffix}": one for suffix, one in stored.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))

    def treat(_module: Any, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        x = args[0].numpy() * factor.numpy()
        return (torch.from_numpy(np.clip(np.rint(x / np.float32(0.001)), -128, 127) * np.float32(0.001)),)

    down = model.model.layers[0].mlp.down_proj
    down.weight.data = torch.from_numpy(code.numpy() * scale.numpy()[:, None])
    down.register_forward_pre_hook(treat)
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        expected = model(ids).logits
        given = reference.load(tmp_path)(ids).logits
    assert torch.allclose(given, expected, atol=1e-6)
    loss = torch.nn.functional.cross_entropy(expected[0, :-1], ids[0, 1:], reduction="sum")
    told = reference.log_probabilities(reference.load(tmp_path), list(range(20)), [])
    assert told.shape == (19, 64)
    assert reference.negative_log_likelihood(told, list(range(20))) == pytest.approx(float(loss), rel=1e-6)


def test_the_divergence_is_that_of_the_textbook(reference: Any) -> None:
    random = np.random.default_rng(8)
    p, q = (random.dirichlet(np.ones(50), 7) for _ in range(2))
    given = reference.divergence(torch.from_numpy(np.log(p)), torch.from_numpy(np.log(q)))
    assert given == pytest.approx(float((p * np.log(p / q)).sum()))
    assert reference.divergence(torch.from_numpy(np.log(p)), torch.from_numpy(np.log(p))) == 0


def test_a_long_document_is_cut_between_its_paragraphs(scripts_on_path: None) -> None:
    text = importlib.import_module("held_out_text")

    class Letters:
        bos_token_id = 1

        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            assert not add_special_tokens
            return [ord(letter) for letter in text]

    paragraphs = ["a" * 40, "b" * 50, "c" * 70, "d" * 5]
    rows = text.sequences(Letters(), ["\n\n".join(paragraphs), "short"], 100)
    assert ["".join(map(chr, row[1:])) for row in rows] == ["a" * 40 + "\n\n" + "b" * 50, "c" * 70 + "\n\n" + "d" * 5]
    assert all(row[0] == 1 and len(row) <= 100 for row in rows)


def test_no_paragraph_that_is_measured_on_was_trained_on(scripts_on_path: None, tmp_path: Path) -> None:
    text, make = importlib.import_module("held_out_text"), importlib.import_module("make_tiny_llama")
    trained, held = make.documents(3)
    (tmp_path / "training.json").write_text(json.dumps({"seed": 3}))
    (tmp_path / "held_out.json").write_text(json.dumps(held))
    parts = text.untrained_documents(tmp_path)
    assert parts["held_out"][: len(held)] == held
    assert text.training_documents(tmp_path) == trained
    everything = "".join(trained + held)
    for document in parts["held_out"][len(held) :]:
        for paragraph in document.split("\n\n"):
            assert len(paragraph) < 100 or paragraph[:1000] not in everything
    assert len(parts["new_words"]) > 100
    assert not set(parts["new_words"]) & set(trained)
    (tmp_path / "held_out.json").write_text(json.dumps(held[1:]))
    with pytest.raises(SystemExit, match="train it again"):
        text.untrained_documents(tmp_path)


def test_planted_outliers_change_the_inputs_of_the_matrices_and_not_the_logits(reference: Any, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    plant = importlib.import_module("plant_outliers")
    torch.manual_seed(1)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=1, **sizes))
    model.half().save_pretrained(tmp_path / "plain")
    assert plant.main([str(tmp_path / "plain"), str(tmp_path / "planted"), "--channels", "3", "--factor", "8"]) == 0
    ids, seen, logits = torch.arange(30)[None], {}, {}
    for name in ("plain", "planted"):
        llama = reference.load(tmp_path / name)
        keep = seen.setdefault(name, [])
        llama.model.layers[1].mlp.up_proj.register_forward_pre_hook(lambda _m, args, keep=keep: keep.append(args[0]))
        with torch.inference_mode():
            logits[name] = llama(ids).logits
    torch.testing.assert_close(logits["planted"], logits["plain"], rtol=1e-4, atol=1e-5)
    ratio = (seen["planted"][0].abs().amax((0, 1)) / seen["plain"][0].abs().amax((0, 1))).round()
    assert sorted(ratio.tolist()) == [1.0] * 61 + [8.0] * 3


def test_a_whole_run_says_what_every_format_costs(bench: Any, random_llama: Any, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Paragraph {number} speaks of {number * 7} things." * 3 for number in range(40)))
    schemes = "fp16,fp8,int8,int8_sq,int4_fp8,int4-rtn-mse,int4-awq-mse,int4-gptq-mse:quantized"
    options = ["--samples", "2", "--tokens", "64", "--kv", "fp16,int8", "--schemes", schemes, "--text", str(text)]
    folders = ["--model", str(random_llama()), "--work", str(tmp_path / "work"), "--json", str(tmp_path / "out.json")]
    assert bench.main([*folders, *options]) == 0
    (run,) = json.loads((tmp_path / "out.json").read_text())["runs"]
    cost = {name: one["means"]["text divergence"][0] for name, one in run["results"].items()}
    assert cost["fp16, fp16"] == 0
    assert 0 < cost["int8, fp16"] < cost["fp8, fp16"] < cost["int4-rtn-mse, fp16"]
    assert 0 < cost["int8_sq, fp16"] < cost["int4_fp8, fp16"]
    assert all(cost[f"{name}, int8"] > 0 for name in schemes.split(","))
    assert {"this", "against", "means"} <= run["comparisons"][0].keys()
    assert len(run["results"]["fp8, int8"]["nats"]) == run["parts"]["text"]["sequences"] > 1
