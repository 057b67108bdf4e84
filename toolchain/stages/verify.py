"""Measure a quantized checkpoint against the model that it was made from, and write the report.

A layer at a time: memory is bounded, and an interrupted run continues at the layer in hand. It judges nothing: what is
good enough, the recipe says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from toolchain import __version__, workspace
from toolchain.checkpoint import Checkpoint
from toolchain.progress import Progress
from toolchain.quantizers import documents
from toolchain.quantizers.place import ON_CPU, Place, memory_errors, open_device, resident

if TYPE_CHECKING:
    from toolchain.quality.measures import Measure
    from toolchain.quality.passes import Found, Way
    from toolchain.quantizers.samples import Samples

VERSION = "1"
"""Raised when the same checkpoint and text would give other numbers."""

REPORT = "report.json"

ORIGINAL, WEIGHTS = "original", "weights"
"""How the report calls the unquantized model, and the quantized one without a rounded cache; with one it is called as
the cache is, ``"int8"`` or ``"fp8"``."""


def verify(
    original: Checkpoint,
    quantized: Checkpoint,
    draft: workspace.Draft,
    *,
    kvs: Sequence[str],
    rounds_inputs: bool,
    samples: Samples,
    progress: Progress,
    place: Place = ON_CPU,
) -> dict[str, Any]:
    """Fill ``draft`` with ``report.json``; the caller commits it. -> the report.

    ``kvs``: caches to simulate, of ``"int8"`` and ``"fp8"``; ``rounds_inputs``: whether the engine rounds the inputs of
    linear layers where the checkpoint has scales for that. Both as TensorRT-LLM does (``quality.rounding``): each token
    attends to rounded keys and values of all tokens before it, while an engine may keep those of the prompt in hand
    unrounded until it is done; so the cache is shown at its worst.

    Raises ArtifactError where the checkpoints do not belong together or hold NaN or infinity, PlanError where a layer
    does not fit the memory.
    """
    from toolchain.quality.need import choose_chunk
    from toolchain.quality.passes import Passes, Way

    ways = [Way(ORIGINAL, quantized=False), Way(WEIGHTS, quantized=True)]
    ways += [Way(kv, quantized=True, kv=kv) for kv in kvs]
    device = open_device(place)
    count, tokens = samples.token_ids.shape
    chunk = choose_chunk(original.config, count, tokens, len(ways), max_ram=place.max_ram, base=resident())
    with memory_errors():
        passes = Passes(
            original,
            quantized,
            ways,
            samples,
            draft.path,
            chunk_tokens=chunk,
            rounds_inputs=rounds_inputs,
            device=device,
        )
        documents.check_room(draft, passes.nbytes)
        found = passes.run(draft.journal(), draft.record, progress)
    passes.clear()
    report = _report(original, quantized, ways, samples, found, rounds_inputs=rounds_inputs)
    workspace.write_durably(draft.path / REPORT, (json.dumps(report, indent=1) + "\n").encode())
    return report


def _report(
    original: Checkpoint,
    quantized: Checkpoint,
    ways: Sequence[Way],
    samples: Samples,
    found: Found,
    *,
    rounds_inputs: bool,
) -> dict[str, Any]:
    count, tokens = samples.token_ids.shape
    counts = [tokens - 1] * count
    first = found.predictions[ORIGINAL]
    algo = quantized.quantization.quant_algo if quantized.quantization else None
    models = {}
    for way in ways:
        one = found.predictions[way.name]
        models[way.name] = {
            "kv": way.kv,
            **_plain(one.measures(first, counts)),
            "sequences": {"nats": list(one.nats), "kl": list(one.kl), "agree": list(one.agree)},
        }
    return {
        "report": "quality",
        "scalellm": __version__,
        "version": VERSION,
        "original": str(original.path),
        "checkpoint": str(quantized.path),
        "quant_algo": algo,
        "inputs_rounded": rounds_inputs,
        "text": {"source": samples.source, "digest": samples.digest, "sequences": count, "tokens": tokens},
        "units": {"kl": "nats a token", "sequences": "sums over tokens - 1 predictions of a sequence"},
        "models": models,
        "caches": found.caches,
    }


def _plain(measures: Mapping[str, Measure]) -> dict[str, Any]:
    return {name: one.to_json() for name, one in measures.items()}
