"""Calibration samples on their way through the model: one decoder layer in memory, hidden states in files between.

``Calibration.observe`` runs a layer on the hidden states before it, gathers its statistics and stores the hidden states
behind it. What a journal keeps of each finished layer (``entry``) is what a later run continues from. It knows no
method of quantization and writes no tensor of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from toolchain import family
from toolchain.errors import ArtifactError
from toolchain.quantizers import forward
from toolchain.quantizers.activations import Activations
from toolchain.quantizers.budget import MOST_TOKENS
from toolchain.quantizers.layer import restore
from toolchain.quantizers.samples import Samples
from toolchain.quantizers.source import Source
from toolchain.quantizers.statistics import LayerStatistics, NonFiniteActivationsError

HIDDEN = "hidden"
"""The journal's key for the sha256 of the hidden states behind a unit."""


class Calibration:
    """The samples' hidden states between the layers of one model."""

    def __init__(
        self,
        source: Source,
        samples: Samples,
        folder: Path,
        chunk_tokens: int = MOST_TOKENS,
        compute: str = "auto",
    ) -> None:
        self._source = source
        self._config = source.checkpoint.config
        self._samples = samples
        self._dtype = compute_dtype(source.on_host("model.embed_tokens.weight").dtype, compute)
        count, tokens = samples.token_ids.shape
        self._store = Activations(folder, (count, tokens, self._config.hidden_size), self._dtype, chunk_tokens)
        self._check_ids()

    @property
    def nbytes(self) -> int:
        """What the hidden states take on the disk at most: those before, behind, and one not yet removed."""
        return 3 * self._store.nbytes

    def can_continue(
        self, finished: Sequence[Mapping[str, Any]], advance: Callable[[int], None] = lambda _count: None
    ) -> bool:
        """Whether the hidden states behind the last finished unit are there, from these very samples."""
        last = finished[-1]
        layers_done = len(finished) - 1
        if last.get("samples") != self._samples.digest:
            return False
        return layers_done >= self._config.num_layers or self._store.holds(layers_done, last[HIDDEN], advance)

    def embed(self) -> dict[str, Any]:
        """Store the embedded samples. -> what the journal keeps."""
        table = self._source.on_host("model.embed_tokens.weight")
        ids = torch.from_numpy(self._samples.token_ids)
        chunks = (forward.embed(table, ids[part]).to(self._dtype) for part in self._store.chunks())
        digest = self._store.write(0, chunks)
        self._source.release("model.embed_tokens.weight")
        return {HIDDEN: digest, "samples": self._samples.digest}

    def observe(
        self, layer: int, *, inputs: bool = True, rows: bool = False, hessian: bool = False, store: bool = True
    ) -> tuple[LayerStatistics, dict[str, Any]]:
        """Run a layer as the model has it. -> its statistics, and what the journal keeps once the layer is finished.

        With ``store`` the hidden states behind it are stored, except behind the last layer, where nobody asks for them.
        Raises ArtifactError for NaN or infinity on the way.
        """
        count, tokens = self._samples.token_ids.shape
        seen = LayerStatistics(count * tokens, inputs=inputs, rows=rows, hessian=hessian)
        weights = self._weights(layer)
        try:
            hidden = self._run(layer, weights, seen.tap, store)
        except NonFiniteActivationsError as error:
            raise self._not_finite(layer, error.tap) from error
        self._release(layer)
        return seen, hidden

    def advance(self, layer: int, weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Store the hidden states behind a layer with other ``weights`` (by name within the layer, any dtype)."""
        narrow = {name: self.narrow(tensor) for name, tensor in weights.items()}
        return self._run(layer, narrow, lambda _name, _x: None, store=True)

    def narrow(self, weight: torch.Tensor) -> torch.Tensor:
        """In the dtype of the computation."""
        return weight.to(self._dtype)

    def passed(self) -> dict[str, Any]:
        """What the journal keeps of a unit behind the layers."""
        return {"samples": self._samples.digest}

    def recorded(self, entry: Mapping[str, Any]) -> None:
        """To be called once the journal holds ``entry``: the hidden states that it makes needless are removed."""
        name = str(entry.get("unit", ""))
        if HIDDEN in entry and name.startswith("layer "):
            self._store.drop_before(int(name.removeprefix("layer ")) + 1)

    def close(self) -> None:
        """Remove every hidden state: the work is done."""
        self._store.clear()

    def _run(self, layer: int, weights: Mapping[str, torch.Tensor], tap: forward.Tap, store: bool) -> dict[str, Any]:
        chunks = self._through(layer, weights, tap)
        entry: dict[str, Any] = {HIDDEN: "", "samples": self._samples.digest}
        if store and layer + 1 < self._config.num_layers:
            return entry | {HIDDEN: self._store.write(layer + 1, chunks)}
        for _ in chunks:
            pass
        return entry

    def _through(self, layer: int, weights: Mapping[str, torch.Tensor], tap: forward.Tap) -> Iterator[torch.Tensor]:
        for hidden in self._store.read(layer):
            yield forward.decoder_layer(hidden.to(self._source.device), weights, self._config, tap)

    def _names(self, layer: int) -> dict[str, str]:
        return {name: f"model.layers.{layer}.{name}" for name in family.layer_tensors(self._config)}

    def _weights(self, layer: int) -> dict[str, torch.Tensor]:
        """The layer in the dtype of the computation: views of the mapped files where they have it, else copies."""
        weights = {}
        for name, full in self._names(layer).items():
            stored = self._source.weight(full)
            prefix = full.removesuffix("weight")
            others = {suffix: f"{prefix}{suffix}" for suffix in ("weight_scale", "pre_quant_scale")}
            others = {suffix: other for suffix, other in others.items() if other in self._source.checkpoint.tensors}
            if others:
                scales = {suffix: self._source.weight(other) for suffix, other in others.items()}
                weights[name] = self.narrow(restore({"weight": stored, **scales}))
                self._source.release(full)
            elif stored.dtype == self._dtype and stored.data_ptr() % stored.element_size() == 0:
                weights[name] = stored
            else:
                weights[name] = torch.empty(stored.shape, dtype=self._dtype, device=stored.device).copy_(stored)
                self._source.release(full)
        return weights

    def _release(self, layer: int) -> None:
        for full in self._names(layer).values():
            self._source.release(full)

    def _check_ids(self) -> None:
        ids, vocabulary = self._samples.token_ids, self._config.vocab_size
        if ids.size == 0:
            raise ArtifactError(f"calibration data {self._samples.source}: it gives no sample")
        if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
            raise ArtifactError(
                f"calibration data {self._samples.source}: holds token {int(ids.max())}, and the model at "
                f"{self._source.checkpoint.path} has {vocabulary}",
                hint="The tokenizer's files are not those of this model.",
            )

    def _not_finite(self, layer: int, tap: str) -> ArtifactError:
        for full in self._names(layer).values():
            if not bool(torch.isfinite(self._source.on_host(full)).all()):
                return self._source.not_finite(full)
        place = {"k": "the keys", "v": "the values"}.get(tap, f"the input of {tap}")
        return ArtifactError(
            f"{self._source.checkpoint.path}: NaN or infinity in {place} of layer {layer}, with finite weights, on the "
            f"calibration data {self._samples.source}: the model overflows {str(self._dtype).removeprefix('torch.')}",
            hint="Check that config.json belongs to these weights, or give other calibration data.",
        )


def compute_dtype(stored: torch.dtype, compute: str = "auto") -> torch.dtype:
    """In which dtype a model of this dtype is run: see ``layout.Scheme.compute``.

    float16 GEMMs are ten times slower than bfloat16 on a CPU, and a GPU takes the same so that both can be compared.
    The ranges that are seen differ by up to 2 % between float16 and bfloat16.
    """
    return torch.bfloat16 if stored == torch.float16 and compute == "auto" else stored


def observe_kv(
    calibration: Calibration,
    layers: int,
    journal: Sequence[Mapping[str, Any]],
    record: Callable[[Mapping[str, Any]], None],
    advance: Callable[[int], None],
) -> list[dict[str, Any]]:
    """Only the ranges of K and V, for weights that stay as they are. -> ``k_amax`` and ``v_amax`` of each layer.

    Continues behind the last layer that ``journal`` holds; ``advance`` gets the layers as they are done.
    """
    done = {entry["unit"]: entry for entry in journal if HIDDEN in entry}
    finished = [done[name] for name in ("embeddings", *(f"layer {layer}" for layer in range(layers))) if name in done]
    if finished and not calibration.can_continue(finished):
        finished = []
    ranges = [entry["calibration"] for entry in finished[1:]]
    advance(len(ranges))
    if not finished:
        record({"unit": "embeddings", **calibration.embed()})
    for layer in range(len(ranges), layers):
        seen, hidden = calibration.observe(layer, inputs=False)
        ranges.append({"layer": layer, "k_amax": seen.k_amax, "v_amax": seen.v_amax})
        entry = {"unit": f"layer {layer}", "calibration": ranges[-1], **hidden}
        record(entry)
        calibration.recorded(entry)
        advance(1)
    calibration.close()
    return ranges
