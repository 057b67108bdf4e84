"""The engine's folder: the checkpoint's shards by hard links, and the documents as TensorRT-LLM's loader reads them.

    OUT/config.json  hf_quant_config.json  *.safetensors  *.index.json  tokenizer ...  model.yaml  trtllm-serve.yaml

The loader takes every ``*.safetensors`` of the folder (tensorrt_llm/_torch/models/checkpoints/hf/weight_loader.py, all
releases that we read). It knows nothing of what a checkpoint must hold; see ``checks``.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolchain import workspace
from toolchain.backends.tensorrt_llmapi.checks import STORED, UNFOLDED, algo_of, lacks_unit_scales
from toolchain.backends.tensorrt_llmapi.settings import arguments, model_yaml, serve_yaml
from toolchain.checkpoint import Checkpoint, read_json
from toolchain.family import LlamaConfig, layer_linears, linear_name, linear_shape
from toolchain.planning.plan import Plan

UNIT_SCALES = "pre-quant-scales.safetensors"
"""Scales of 1 for int4 weights that were made without AWQ: the loader has no other int4 than AWQ's."""

_INDEX = "model.safetensors.index.json"
_QUANT = "hf_quant_config.json"
_TOKENIZER = "tokenizer_config.json"
_ONE = {"F16": b"\x00\x3c", "BF16": b"\x80\x3f"}
"""1.0, little endian."""


def write(checkpoint: Checkpoint, plan: Plan, out: Path) -> None:
    """Fill the draft folder ``out`` from a checkpoint that was checked."""
    out.mkdir(parents=True, exist_ok=True)
    places = {name: info.file.name for name, info in checkpoint.tensors.items()}
    for file in sorted({info.file for info in checkpoint.tensors.values()}):
        workspace.link(file.resolve(), out / file.name)
    unit_scales = lacks_unit_scales(checkpoint)
    if unit_scales:
        places |= dict.fromkeys(_write_unit_scales(checkpoint.config, plan.dtype, out / UNIT_SCALES), UNIT_SCALES)
    if len(set(places.values())) > 1:
        total = sum((out / file).stat().st_size for file in set(places.values()))
        _write_json(out / _INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))})
    algo = algo_of(checkpoint)
    _write_json(out / "config.json", _config(checkpoint, plan.dtype, quantized=algo is not None))
    if algo is not None:
        document = read_json(checkpoint.path / _QUANT)
        if unit_scales:
            document["quantization"]["pre_quant_scale"] = True
        _write_json(out / _QUANT, document)
    for file in checkpoint.side_files:
        if file.name == _TOKENIZER:
            _write_json(out / _TOKENIZER, _tokenizer(read_json(file)))
        else:
            shutil.copyfile(file, out / file.name)
    told = arguments(plan)
    workspace.write_durably(out / "model.yaml", model_yaml(told).encode())
    workspace.write_durably(out / "trtllm-serve.yaml", serve_yaml(told).encode())


def _config(checkpoint: Checkpoint, dtype: str, *, quantized: bool) -> dict[str, Any]:
    """``config.json`` as transformers 4 spells it, which TensorRT-LLM 1.0 to 1.2 has (4.53.1 to 4.57.3).

    transformers 5 writes ``dtype`` and ``rope_parameters``. A reader of version 4 passes over both: the dtype is then
    taken for bfloat16 and the base of the rotation for 10000. Version 5 reads the old spelling as well. Without
    ``quantization_config`` where only the cache is quantized: the loader wants a ``quant_algo`` wherever there is one.
    """
    written = dict(read_json(checkpoint.path / "config.json"))
    written.pop("dtype", None)
    written["torch_dtype"] = dtype
    if not quantized:
        written.pop("quantization_config", None)
    rope = written.pop("rope_parameters", None)
    if rope:
        written["rope_theta"] = checkpoint.config.rope_theta
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        written["rope_scaling"] = scaling if checkpoint.config.rope_scaling else None
    return written


def _tokenizer(written: Mapping[str, Any]) -> dict[str, Any]:
    """``tokenizer_config.json`` as transformers 4 spells it.

    transformers 5 writes its own class TokenizersBackend, which version 4 does not know (transformers issue 47553), and
    lists further special tokens under ``extra_special_tokens``, where version 4 wants an object. Version 5 takes both
    spellings. trtllm-serve reads this file; the Triton models read ``tokenizer.json``.
    """
    found = dict(written)
    if found.get("tokenizer_class") == "TokenizersBackend":
        found["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(found.get("extra_special_tokens"), list):
        found["additional_special_tokens"] = found.pop("extra_special_tokens")
    return found


def _write_unit_scales(config: LlamaConfig, dtype: str, file: Path) -> list[str]:
    """A safetensors file of ones, [in] for each of o_proj and down_proj. -> the tensors' names."""
    kind = STORED[dtype]
    header: dict[str, Any] = {}
    offset = 0
    for layer, linear in layer_linears(config):
        if linear in UNFOLDED:
            columns = linear_shape(config, linear)[1]
            span = [offset, offset := offset + 2 * columns]
            header[f"{linear_name(layer, linear)}.pre_quant_scale"] = {
                "dtype": kind,
                "shape": [columns],
                "data_offsets": span,
            }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    workspace.write_durably(file, struct.pack("<Q", len(text)) + text + _ONE[kind] * (offset // 2))
    return list(header)


def _write_json(file: Path, document: Mapping[str, Any]) -> None:
    workspace.write_durably(file, (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode())
