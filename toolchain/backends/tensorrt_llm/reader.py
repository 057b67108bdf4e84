"""A TensorRT-LLM checkpoint, all of its ranks, read back as float32 matrices under Hugging Face's names.

For tests and for looking into a folder: the numbers that an engine computes with, before it rounds inputs. It takes
what ``writer`` writes and what ModelOpt exports. Matrices are made one at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from toolchain.backends.tensorrt_llm.numbers import Floats, floats, unpack_int4
from toolchain.backends.tensorrt_llm.split import MODULES, NORMS, ROW_PARALLEL, Split
from toolchain.checkpoint import TensorInfo, read_header, read_json
from toolchain.errors import ArtifactError
from toolchain.safetensors_file import Bytes

_AGAIN = "Write the TensorRT-LLM checkpoint again."


@dataclass(frozen=True)
class TensorRtLlmCheckpoint:
    """A folder with ``config.json`` and the files of all ranks."""

    path: Path
    config: dict[str, Any]
    """``config.json`` as it is."""
    split: Split
    ranks: tuple[dict[str, TensorInfo], ...]
    """The tensors of each rank, by name."""

    @classmethod
    def open(cls, path: Path) -> TensorRtLlmCheckpoint:
        """Check the headers. ArtifactError naming the file that is missing or damaged."""
        file = path / "config.json"
        config = read_json(file)
        try:
            mapping = config["mapping"]
            split = Split(int(mapping["tp_size"]), int(mapping["pp_size"]))
            numbers = [config[key] for key in ("num_hidden_layers", "num_attention_heads", "vocab_size", "head_size")]
            if not all(isinstance(number, int) and number > 0 for number in (*numbers, split.tp, split.pp)):
                raise ValueError("sizes are whole numbers above zero")
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"{file}: not that of a TensorRT-LLM checkpoint: {error}") from error
        names = [split.file(stage, rank) for stage in range(split.pp) for rank in range(split.tp)]
        for name in names:
            if not (path / name).is_file():
                raise ArtifactError(f"{path / name}: no such file, of {split.world_size} ranks", hint=_AGAIN)
        return cls(path, config, split, tuple(read_header(path / name) for name in names))

    def kv_scales(self) -> list[float] | None:
        """The factor that K and V of each layer are dequantized by, or None for a cache that is not quantized."""
        if not (self.config.get("quantization") or {}).get("kv_cache_quant_algo"):
            return None
        name = "attention.kv_cache_scaling_factor"
        return [
            float(self._floats(stage * self.split.tp, f"transformer.layers.{place}.{name}")[0])
            for stage, place in self._places()
        ]

    def dense(self) -> Iterator[tuple[str, Floats]]:
        """(Hugging Face's name, float32) of every weight, norm and bias, and of ``lm_head`` also where it is tied.

        Raises ArtifactError naming the file and the tensor that is missing or does not fit.
        """
        yield "model.embed_tokens.weight", self._embedding()
        for layer, (stage, place) in enumerate(self._places()):
            old, new = f"model.layers.{layer}", f"transformer.layers.{place}"
            for ours, theirs in NORMS.items():
                yield f"{old}.{theirs}.weight", self._floats(stage * self.split.tp, f"{new}.{ours}.weight")
            for module in MODULES:
                yield from self._module(old, new, module, stage)
        last = (self.split.pp - 1) * self.split.tp
        yield "model.norm.weight", self._floats(last, "transformer.ln_f.weight")
        heads = [self._floats(last + rank, "lm_head.weight") for rank in range(self.split.tp)]
        yield "lm_head.weight", np.concatenate(heads)[: self.config["vocab_size"]]

    def _places(self) -> list[tuple[int, int]]:
        """(pipeline stage, number within it) of each layer."""
        count = int(self.config["num_hidden_layers"]) // self.split.pp
        return [(stage, place) for stage in range(self.split.pp) for place in range(count)]

    def _embedding(self) -> Floats:
        name = "transformer.vocab_embedding.weight"
        if not self.config.get("use_parallel_embedding"):
            return self._floats(0, name)
        parts = [self._floats(rank, name) for rank in range(self.split.tp)]
        return np.concatenate(parts, axis=self.config.get("embedding_sharding_dim", 0))[: self.config["vocab_size"]]

    def _module(self, old: str, new: str, module: str, stage: int) -> Iterator[tuple[str, Floats]]:
        first = stage * self.split.tp
        ranks = range(first, first + self.split.tp)
        weights = [self._matrix(rank, f"{new}.{module}") for rank in ranks]
        bias = f"{new}.{module}.bias"
        biases = [self._floats(rank, bias) for rank in ranks] if bias in self.ranks[first] else []
        if module in ROW_PARALLEL:
            yield f"{old}.{MODULES[module][0]}.weight", np.concatenate(weights, axis=1)
            if biases:
                yield f"{old}.{MODULES[module][0]}.bias", biases[0]
            return
        for linear, start, stop, step in self._parts(module, weights[0].shape[0]):
            yield f"{old}.{linear}.weight", np.concatenate([one[start:stop] for one in weights[::step]])
            if biases:
                yield f"{old}.{linear}.bias", np.concatenate([one[start:stop] for one in biases[::step]])

    def _parts(self, module: str, rows: int) -> Iterator[tuple[str, int, int, int]]:
        """(linear, first row, row behind the last, every how many ranks it is another one) of a fused matrix."""
        if module != "attention.qkv":
            yield MODULES[module][0], 0, rows, 1
            return
        heads, size = int(self.config["num_attention_heads"]), int(self.config["head_size"])
        kv_heads = int(self.config.get("num_key_value_heads") or heads)
        q, kv = heads // self.split.tp * size, max(1, kv_heads // self.split.tp) * size
        if rows != q + 2 * kv:
            raise ArtifactError(f"{self.path}: {module} has {rows} rows on a rank, not {q + 2 * kv}", hint=_AGAIN)
        names, copies = MODULES[module], max(1, self.split.tp // kv_heads)
        yield names[0], 0, q, 1
        yield names[1], q, q + kv, copies
        yield names[2], q + kv, rows, copies

    def _matrix(self, rank: int, name: str) -> Floats:
        """[out, in] of a rank: codes * weights_scaling_factor * prequant_scaling_factor, as far as there are any."""
        info = self._info(rank, f"{name}.weight")
        rows, columns = info.shape
        scale_name, prequant = f"{name}.weights_scaling_factor", f"{name}.prequant_scaling_factor"
        quantized = info.dtype in ("I8", "F8_E4M3")
        scale = self._floats(rank, scale_name) if quantized else None
        if scale is not None and scale.ndim == 2:
            codes: Any = unpack_int4(_bytes(info).reshape(rows, columns))
            weight = codes * np.repeat(scale, columns // scale.shape[1], axis=1)
        else:
            weight = floats(_bytes(info), info.dtype).reshape(rows, columns)
            if scale is not None:
                weight = weight * (scale if scale.size == 1 else scale[:, None])
        if prequant in self.ranks[rank]:
            weight = weight * self._floats(rank, prequant)
        found: Floats = weight
        return found

    def _floats(self, rank: int, name: str) -> Floats:
        info = self._info(rank, name)
        return floats(_bytes(info), info.dtype).reshape(info.shape)

    def _info(self, rank: int, name: str) -> TensorInfo:
        if name not in self.ranks[rank]:
            raise ArtifactError(f"{self.path / f'rank{rank}.safetensors'}: has no {name}", hint=_AGAIN)
        return self.ranks[rank][name]


def _bytes(info: TensorInfo) -> Bytes:
    return np.asarray(np.memmap(info.file, np.uint8, "r", info.offset, (info.nbytes,)))
