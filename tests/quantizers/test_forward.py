"""The forward pass, held against transformers' Llama, Mistral and Qwen2."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.quantizers.calibrated import ROPES, hooked, load, random_samples
from toolchain import family
from toolchain.checkpoint import Checkpoint
from toolchain.quantizers import forward
from toolchain.quantizers.source import Source


@pytest.mark.parametrize("shape", ROPES.values(), ids=ROPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 0.0)])
def test_every_layer_and_every_tap_are_transformers(
    random_llama: Callable[..., Path], shape: dict[str, object], dtype: torch.dtype, tolerance: float
) -> None:
    """In bfloat16 bit for bit: the same operations, rounded at the same places."""
    model = random_llama(dtype=str(dtype).removeprefix("torch."), **shape)
    checkpoint = Checkpoint.open(model)
    source, config = Source(checkpoint), checkpoint.config
    ids = torch.from_numpy(random_samples(3, 70).token_ids)
    theirs = hooked(load(model, dtype), ids)
    hidden = forward.embed(source.weight("model.embed_tokens.weight"), ids)
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}"
        close(hidden, theirs[prefix], tolerance)
        weights = {name: source.weight(f"{prefix}.{name}") for name in family.layer_tensors(config)}
        ours: dict[str, torch.Tensor] = {}
        hidden = forward.decoder_layer(hidden, weights, config, ours.__setitem__)
        assert set(ours) == {group[0] for group in family.SHARED_INPUT} | {"k", "v"}
        for group in family.SHARED_INPUT:
            for linear in group:
                close(ours[group[0]], theirs[f"{prefix}.{linear}"].flatten(0, 1), tolerance)
        close(ours["k"], theirs[f"{prefix}.k"], tolerance)
        close(ours["v"], theirs[f"{prefix}.v"], tolerance)
    close(hidden, theirs["model.norm"], tolerance)


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


def test_rotary_scaling_changes_the_angles(random_llama: Callable[..., Path]) -> None:
    """A guard on the test above: its models do differ in what they rotate by."""
    tables = [
        forward.rotary(
            Checkpoint.open(random_llama(dtype="float32", **ROPES[name])).config,
            70,
            torch.float32,
            torch.device("cpu"),
        )[0]
        for name in ("gqa", "llama3-rope", "linear-rope")
    ]
    assert not torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0], tables[2])


def test_a_token_sees_no_later_token(random_llama: Callable[..., Path]) -> None:
    checkpoint = Checkpoint.open(random_llama(dtype="float32"))
    source = Source(checkpoint)
    weights = {name: source.weight(f"model.layers.0.{name}") for name in family.layer_tensors(checkpoint.config)}
    hidden = torch.randn(1, 12, 256, generator=torch.Generator().manual_seed(3))
    changed = hidden.clone()
    changed[:, 7:] += 1
    one, other = (
        forward.decoder_layer(x, weights, checkpoint.config, lambda _name, _x: None) for x in (hidden, changed)
    )
    assert torch.equal(one[:, :7], other[:, :7])
    assert not torch.equal(one[:, 7:], other[:, 7:])


@pytest.mark.parametrize(("shape", "biased"), [("biased", 4), ("qwen2", 3), ("gqa", 0)])
def test_a_bias_that_is_left_out_is_noticed(random_llama: Callable[..., Path], shape: str, biased: int) -> None:
    """A guard on the first test: its models have biases that matter, and the forward pass insists on them."""
    checkpoint = Checkpoint.open(random_llama(dtype="float32", **ROPES[shape]))
    source, config = Source(checkpoint), checkpoint.config
    names = [name for name in checkpoint.tensors if name.startswith("model.layers.0") and name.endswith(".bias")]
    assert len(names) == len(config.biased) == biased
    weights = {name: source.weight(f"model.layers.0.{name}") for name in family.layer_tensors(config)}
    hidden = torch.randn(1, 12, 256, generator=torch.Generator().manual_seed(3))
    whole = forward.decoder_layer(hidden, weights, config, lambda _name, _x: None)
    for linear in config.biased:
        zero = weights | {f"{linear}.bias": torch.zeros_like(weights[f"{linear}.bias"])}
        other = forward.decoder_layer(hidden, zero, config, lambda _name, _x: None)
        assert float((other - whole).abs().max()) > 1e-3
        del zero[f"{linear}.bias"]
        with pytest.raises(KeyError, match="bias"):
            forward.decoder_layer(hidden, zero, config, lambda _name, _x: None)
