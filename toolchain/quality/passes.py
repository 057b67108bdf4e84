"""Text through several models at once, layer by layer: one layer in memory, hidden states in files between.

A ``Way`` is one model as it is computed somewhere: unquantized, with quantized weights, with a rounded cache besides. A
journal keeps what each finished layer gave, so that an interrupted run continues at the layer in hand.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from toolchain.checkpoint import Checkpoint
from toolchain.errors import ArtifactError
from toolchain.progress import Progress
from toolchain.quality.head import Head, Sums, all_sums, compare
from toolchain.quality.layers import Kernels, cache_scales, check_same_model, open_layer
from toolchain.quality.measures import Predictions
from toolchain.quantizers import forward
from toolchain.quantizers.activations import Activations
from toolchain.quantizers.place import give_back
from toolchain.quantizers.samples import Samples
from toolchain.quantizers.source import CPU, Source

Record = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class Way:
    """One model on its way through the layers."""

    name: str
    quantized: bool
    """Whether it has the quantized weights, or the original ones."""
    kv: str | None = None
    """``"int8"`` or ``"fp8"`` where its cache is rounded."""


@dataclass(frozen=True)
class Found:
    """What a run found."""

    predictions: dict[str, Predictions]
    """By the way's name."""
    caches: dict[str, list[dict[str, Any]]]
    """By format: what rounding the cache of each layer did (``layers.CacheError``)."""


class Passes:
    """The ways of one run. The first of ``ways`` is the one that the others are held against."""

    def __init__(
        self,
        original: Checkpoint,
        quantized: Checkpoint,
        ways: Sequence[Way],
        samples: Samples,
        folder: Path,
        *,
        chunk_tokens: int,
        rounds_inputs: bool,
        device: torch.device = CPU,
    ) -> None:
        """``folder`` is where hidden states are kept; ``rounds_inputs`` as of ``layers.open_layer``.

        Raises ArtifactError where the checkpoints are of different models, have too few words for the text, or do not
        know what a cache that is asked for was calibrated to.
        """
        check_same_model(original, quantized)
        self._sources = {False: Source(original, device), True: Source(quantized, device)}
        self._config = original.config
        self._ways = ways
        self._ids = torch.from_numpy(samples.token_ids)
        self._rounds_inputs = rounds_inputs
        self._folder = folder
        shape = (*self._ids.shape, self._config.hidden_size)
        self._stores = {}
        for way in ways:
            (folder / way.name).mkdir(exist_ok=True)
            self._stores[way.name] = Activations(folder / way.name, shape, torch.float32, chunk_tokens)
        self._scales = {way.kv: _scales(quantized, way.kv) for way in ways if way.kv}
        if int(self._ids.max()) >= self._config.vocab_size:
            raise ArtifactError(
                f"{samples.source}: holds token {int(self._ids.max())}, and {original.path} has "
                f"{self._config.vocab_size}",
                hint="The tokenizer's files are not those of this model.",
            )

    @property
    def nbytes(self) -> int:
        """What the hidden states take on the disk at most."""
        return sum(2 * store.nbytes for store in self._stores.values())

    def run(self, journal: Sequence[Mapping[str, Any]], record: Record, progress: Progress) -> Found:
        """Everything that ``journal`` does not hold already. Raises ArtifactError for weights that are not finite."""
        entries = self._through_layers(journal, record, progress)
        predictions = self._compare(progress)
        found: dict[str, list[dict[str, Any]]] = {}
        for entry in entries:
            for kv, one in entry["caches"].items():
                found.setdefault(kv, []).append(one)
        return Found({way.name: one for way, one in zip(self._ways, predictions, strict=True)}, found)

    def sums(self, progress: Progress) -> list[Sums]:
        """Of each way, at every position of the text: its choice, and the logits that count."""
        self._through_layers([], lambda _entry: None, progress)
        last = self._config.num_layers
        heads = [Head(self._sources[way.quantized]) for way in self._ways]
        return all_sums(heads, lambda number: self.chunks(self._ways[number], last), self._ids)

    def _through_layers(
        self, journal: Sequence[Mapping[str, Any]], record: Record, progress: Progress
    ) -> list[Mapping[str, Any]]:
        """-> the journal's entries, old and new."""
        done = self._finished(journal)
        if journal and not done:
            progress.note("verify: the hidden states are lost, so it begins again")
        elif len(done) > 1:
            progress.note(f"verify: resumed at layer {min(len(done), self._config.num_layers)}")
        entries = list(done)
        if not entries:
            entries.append(self._keep("embeddings", self._embed(), {}, record))
        with progress.task("verify", self._config.num_layers, "layers") as task:
            task.advance(len(entries) - 1)
            for layer in range(len(entries) - 1, self._config.num_layers):
                task.describe(f"layer {layer + 1} of {self._config.num_layers}")
                hidden, caches = self._layer(layer)
                entries.append(self._keep(f"layer {layer}", hidden, caches, record))
                for store in self._stores.values():
                    store.drop_before(layer + 1)
                give_back()
        return entries

    def clear(self) -> None:
        """Remove the hidden states: the work is done."""
        for way in self._ways:
            shutil.rmtree(self._folder / way.name, ignore_errors=True)

    def chunks(self, way: Way, place: int) -> Iterator[torch.Tensor]:
        """The hidden states of a way before a layer, or behind the last."""
        return self._stores[way.name].read(place)

    def _keep(
        self, unit: str, hidden: Mapping[str, str], caches: Mapping[str, Any], record: Record
    ) -> Mapping[str, Any]:
        entry = {"unit": unit, "hidden": dict(hidden), "caches": dict(caches)}
        record(entry)
        return entry

    def _finished(self, journal: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """The entries of the journal, where the hidden states behind the last are still there."""
        by_unit = {entry["unit"]: entry for entry in journal if "hidden" in entry}
        names = ("embeddings", *(f"layer {layer}" for layer in range(self._config.num_layers)))
        done: list[Mapping[str, Any]] = []
        for name in names:
            if name not in by_unit:
                break
            done.append(by_unit[name])
        if not done:
            return []
        last, place = done[-1]["hidden"], len(done) - 1
        whole = all(store.holds(place, last.get(name, "")) for name, store in self._stores.items())
        return done if whole else []

    def _embed(self) -> dict[str, str]:
        hidden = {}
        for way in self._ways:
            source, store = self._sources[way.quantized], self._stores[way.name]
            table = source.on_host("model.embed_tokens.weight")
            hidden[way.name] = store.write(0, (_embedded(table, self._ids[part]) for part in store.chunks()))
            source.release("model.embed_tokens.weight")
        return hidden

    def _layer(self, layer: int) -> tuple[dict[str, str], dict[str, Any]]:
        """-> the hashes of the hidden states behind it, and what rounding the caches did."""
        hidden: dict[str, str] = {}
        caches: dict[str, Any] = {}
        for quantized in self._sources:
            ways = [way for way in self._ways if way.quantized == quantized]
            if ways:
                self._layer_of(quantized, ways, layer, hidden, caches)
        return hidden, caches

    def _layer_of(
        self, quantized: bool, ways: Sequence[Way], layer: int, hidden: dict[str, str], caches: dict[str, Any]
    ) -> None:
        """One checkpoint's layer, whose float32 is gone before the other one's is made."""
        source = self._sources[quantized]
        ranges = self._sources[True].checkpoint.kv_ranges
        opened = open_layer(source, layer, rounds_inputs=quantized and self._rounds_inputs)
        for way in ways:
            scale = self._scales[way.kv][layer] if way.kv else 1.0
            kernels = Kernels(opened.inputs, way.kv, scale)
            store = self._stores[way.name]
            hidden[way.name] = store.write(layer + 1, self._through(way, layer, opened.weights, kernels))
            if kernels.error and way.kv:
                caches[way.kv] = kernels.error.to_json(layer, ranges[layer] if ranges else None)

    def _through(
        self, way: Way, layer: int, weights: Mapping[str, torch.Tensor], kernels: Kernels
    ) -> Iterator[torch.Tensor]:
        device = self._sources[way.quantized].device
        for hidden in self._stores[way.name].read(layer):
            after = forward.decoder_layer(
                hidden.to(device), weights, self._config, lambda _name, _x: None, kernels
            ).cpu()
            if not bool(torch.isfinite(after).all()):
                path = self._sources[way.quantized].checkpoint.path
                raise ArtifactError(
                    f"{path}: NaN or infinity behind layer {layer} ({way.name}), with finite weights",
                    hint="Check that config.json belongs to these weights; quantize again.",
                )
            yield after

    def _compare(self, progress: Progress) -> list[Predictions]:
        heads = [Head(self._sources[way.quantized]) for way in self._ways]
        last = self._config.num_layers
        with progress.task("verify: compare predictions", self._config.vocab_size, "words") as task:
            return compare(heads, lambda number: self.chunks(self._ways[number], last), self._ids, task.advance)


def _embedded(table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return forward.embed(table, ids).float()


def _scales(quantized: Checkpoint, kv: str) -> list[float]:
    found = cache_scales(quantized, kv)
    if found is None:
        raise ArtifactError(
            f"{quantized.path}: does not know the ranges of keys and values, so an {kv} cache cannot be simulated",
            hint="It was not calibrated: scalellm quantize --recipe RECIPE   # with calibration and this kv_cache",
        )
    return found
