"""Quality measured layer by layer, held against whole models in transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.quality.against import CALIBRATION, SCHEMES, TEXT, logits, measured, quantized, reference
from tests.quantizers.calibrated import ROPES, random_samples
from toolchain.checkpoint import KV_RANGES, Checkpoint
from toolchain.errors import ArtifactError
from toolchain.progress import Silent
from toolchain.quality.passes import Found, Passes, Way
from toolchain.quantizers.samples import Samples

ORIGINAL, WEIGHTS = Way("original", quantized=False), Way("weights", quantized=True)


def passes(
    model: Path, folder: Path, at: Path, *kvs: str, samples: Samples = TEXT, chunk_tokens: int = 80, rounds: bool = True
) -> Passes:
    ways = [ORIGINAL, WEIGHTS, *(Way(kv, quantized=True, kv=kv) for kv in kvs)]
    at.mkdir(exist_ok=True)
    return Passes(
        Checkpoint.open(model),
        Checkpoint.open(folder),
        ways,
        samples,
        at,
        chunk_tokens=chunk_tokens,
        rounds_inputs=rounds,
    )


def found(one: Passes) -> Found:
    return one.run([], lambda _entry: None, Silent())


def measures(given: Found, name: str, samples: Samples = TEXT) -> dict[str, float]:
    counts = [samples.token_ids.shape[1] - 1] * len(samples.token_ids)
    taken = given.predictions[name].measures(given.predictions["original"], counts)
    return {key: one.value for key, one in taken.items()}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_measure_of_every_scheme_and_cache_is_that_of_whole_models_in_transformers(
    random_llama: Callable[..., Path], tmp_path: Path, scheme: str
) -> None:
    """Weights, rounded inputs and the cache; transformers' own forward pass, dequantized by code that is not ours."""
    model = random_llama(dtype="float32")
    folder = quantized(model, tmp_path / "q", scheme)
    given = found(passes(model, folder, tmp_path / "w", "int8", "fp8"))
    original = logits(model, TEXT)
    for name, kv in (("weights", "fp16"), ("int8", "int8"), ("fp8", "fp8")):
        wanted = measured(original, logits(folder, TEXT, kv), TEXT)
        ours = measures(given, name)
        assert ours.keys() == wanted.keys()
        for key, value in wanted.items():
            # A number on the edge between two codes may round the other way when sums are in another order.
            assert ours[key] == pytest.approx(value, rel=2e-3, abs=2e-5), (name, key)
    if scheme != "none":
        assert measures(given, "weights")["kl"] > 1e-6


@pytest.mark.parametrize("shape", ROPES.values(), ids=ROPES)
def test_models_of_the_whole_family_are_measured(
    random_llama: Callable[..., Path], tmp_path: Path, shape: dict[str, Any]
) -> None:
    """Grouped heads, rotary scaling, biases, tied tables: perplexity as transformers computes it from its own class."""
    import torch
    from transformers import AutoModelForCausalLM

    model = random_llama(dtype="float32", **shape)
    given = found(passes(model, model, tmp_path / "w"))
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    ids = torch.from_numpy(TEXT.token_ids).long()
    with torch.no_grad():
        loss = float(theirs(ids, labels=ids).loss)
    assert measures(given, "weights")["perplexity"] == pytest.approx(np.exp(loss), rel=1e-5)
    same = measures(given, "weights")
    assert (same["perplexity_ratio"], same["top1_agreement"]) == (1, 1)
    assert same["kl"] == pytest.approx(0, abs=1e-12)


def test_a_vocabulary_in_pieces_and_text_in_chunks_change_nothing(
    random_llama: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_llama(dtype="float32")
    folder = quantized(model, tmp_path / "q", "int4-rtn")
    whole = measures(found(passes(model, folder, tmp_path / "a", chunk_tokens=4096)), "weights")
    monkeypatch.setattr("toolchain.quality.head.PIECE_WORDS", 97)
    monkeypatch.setattr("toolchain.quality.head.ROWS", 7)
    pieces = measures(found(passes(model, folder, tmp_path / "b", chunk_tokens=40)), "weights")
    for key, value in whole.items():
        assert pieces[key] == pytest.approx(value, rel=1e-4, abs=1e-9), key


def test_the_report_of_a_cache_has_the_ranges_and_errors_of_each_layer(
    random_llama: Callable[..., Path], tmp_path: Path
) -> None:
    model = random_llama(dtype="float32")
    folder = quantized(model, tmp_path / "q", "none")
    given = found(passes(model, folder, tmp_path / "w", "int8", samples=CALIBRATION))
    amaxes = reference().kv_amaxes(folder)
    for layer, (one, (k_amax, v_amax)) in enumerate(zip(given.caches["int8"], amaxes, strict=True)):
        assert (one["layer"], one["k_amax_calibrated"], one["v_amax_calibrated"]) == (layer, k_amax, v_amax)
        assert one["scale"] == pytest.approx(max(k_amax, v_amax) / 127)
        assert one["k_to_v"] == pytest.approx(one["k_amax"] / one["v_amax"])
        assert 0 < one["k_error"] < 0.1
        assert 0 < one["v_error"] < 0.1
    first = given.caches["int8"][0]
    assert first["k_amax"] == pytest.approx(amaxes[0][0], rel=1e-4)  # the calibration's own text, in float32
    assert first["k_clipped"] == first["v_clipped"] == 0


def scaled_ranges(folder: Path, factor: float) -> None:
    file = folder / KV_RANGES
    document = json.loads(file.read_text())
    for layer in document["layers"]:
        layer["k_amax"] *= factor
        layer["v_amax"] *= factor
    file.unlink()
    file.write_text(json.dumps(document))


@pytest.mark.parametrize("factor", [10, 0.1])
def test_a_wrong_scale_of_the_cache_shows(random_llama: Callable[..., Path], tmp_path: Path, factor: float) -> None:
    model = random_llama(dtype="float32")
    folder = quantized(model, tmp_path / "q", "none")
    right = found(passes(model, folder, tmp_path / "a", "int8"))
    scaled_ranges(folder, factor)
    wrong = found(passes(model, folder, tmp_path / "b", "int8"))
    assert measures(wrong, "weights") == measures(right, "weights")
    assert measures(wrong, "int8")["kl"] > 20 * measures(right, "int8")["kl"]
    assert wrong.caches["int8"][0]["v_error"] > 4 * right.caches["int8"][0]["v_error"]
    assert (wrong.caches["int8"][0]["k_clipped"] > 0.01) == (factor < 1)


def test_an_interrupted_run_continues_at_its_layer_and_gives_the_same(
    random_llama: Callable[..., Path], tmp_path: Path
) -> None:
    model = random_llama(dtype="float32", num_hidden_layers=3)
    folder = quantized(model, tmp_path / "q", "int4-rtn")
    whole: list[Any] = []
    wanted = passes(model, folder, tmp_path / "a", "fp8").run([], whole.append, Silent())
    assert [entry["unit"] for entry in whole] == ["embeddings", "layer 0", "layer 1", "layer 2"]

    class StoppedError(Exception):
        pass

    journal: list[Any] = []

    def stop_behind_layer_1(entry: Any) -> None:
        journal.append(json.loads(json.dumps(entry)))
        if entry["unit"] == "layer 1":
            raise StoppedError

    with pytest.raises(StoppedError):
        passes(model, folder, tmp_path / "b", "fp8").run([], stop_behind_layer_1, Silent())
    more: list[Any] = []
    given = passes(model, folder, tmp_path / "b", "fp8").run(journal, more.append, Silent())
    assert [entry["unit"] for entry in more] == ["layer 2"]
    assert given == wanted

    damaged = next((tmp_path / "b" / "fp8").glob("hidden-states-*.bin"))
    damaged.write_bytes(b"\0" * damaged.stat().st_size)
    again: list[Any] = []
    assert passes(model, folder, tmp_path / "b", "fp8").run(journal, again.append, Silent()) == wanted
    assert [entry["unit"] for entry in again] == [entry["unit"] for entry in whole]


def test_another_model_is_refused(random_llama: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"num_layers is 3, and 2 in .*made from another model"):
        passes(random_llama(), random_llama(num_hidden_layers=3), tmp_path / "w")
    with pytest.raises(ArtifactError, match="does not know the ranges of keys and values"):
        passes(random_llama(), random_llama(), tmp_path / "w", "int8")
    with pytest.raises(ArtifactError, match="holds token 4"):
        passes(random_llama(), random_llama(), tmp_path / "w", samples=random_samples(2, 16, vocabulary=500))
