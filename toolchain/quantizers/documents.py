"""The documents beside the weights of a quantized checkpoint, written durably, and the room that they need.

``config.json``, ``hf_quant_config.json``, the index of the shards, the ranges of K and V. What they say is made in
``layout`` and ``shards``; it knows no weights.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from toolchain import workspace
from toolchain.checkpoint import KV_RANGES
from toolchain.errors import ArtifactError
from toolchain.quantizers import layout, shards
from toolchain.units import format_bytes

_ROOM_BYTES = 2**20  # documents and reports


def write_json(draft: workspace.Draft, name: str, document: Mapping[str, Any]) -> None:
    text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    workspace.write_durably(draft.path / name, text.encode())


def write_config(
    draft: workspace.Draft,
    config: Mapping[str, Any],
    document: Mapping[str, Any],
    *,
    static_inputs: bool,
    idle_scales: bool = False,
) -> None:
    """The model's ``config.json``, every key of it, with ``quantization_config``; and ``hf_quant_config.json``.

    ``document`` is that of ``layout.hf_quant_config``. With ``idle_scales`` it is written also where nothing is
    quantized, since it is what explains scales in the shards.
    """
    written = {key: value for key, value in config.items() if key != "quantization_config"}
    quantized = document["quantization"]["quant_algo"] or document["quantization"]["kv_cache_quant_algo"]
    if quantized:
        written["quantization_config"] = layout.quantization_config(dict(document), static_inputs=static_inputs)
    if quantized or idle_scales:
        write_json(draft, layout.HF_QUANT_CONFIG, document)
    write_json(draft, "config.json", written)


def write_index(draft: workspace.Draft, tensor_bytes: Mapping[str, Mapping[str, int]]) -> None:
    """File -> {tensor: bytes}; nothing is written for a single file, which needs no index."""
    if len(tensor_bytes) > 1:
        workspace.write_durably(draft.path / shards.INDEX, shards.index_document(tensor_bytes).encode())


def write_kv_ranges(draft: workspace.Draft, layers: Sequence[Mapping[str, Any]]) -> None:
    """``KV_RANGES``: max |K| after rotation and max |V| of each layer."""
    ranges = [{"k_amax": layer["k_amax"], "v_amax": layer["v_amax"]} for layer in layers]
    write_json(draft, KV_RANGES, {"layers": ranges})


def check_room(draft: workspace.Draft, needed: int) -> None:
    """ArtifactError when the disk cannot take ``needed`` bytes that are still to be written, and the documents."""
    free = shutil.disk_usage(draft.path).free
    if free < needed + _ROOM_BYTES:
        raise ArtifactError(
            f"{draft.path}: {format_bytes(needed)} are to be written here and {format_bytes(free)} are free",
            hint="Make room and run the same command again: finished work is kept. Or choose another place.",
        )
