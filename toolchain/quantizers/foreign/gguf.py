"""llama.cpp's GGUF files of the architecture ``llama``: Q4_0 as int4 in groups of 32, floats and Q8_0 as plain weights.

A Q4_0 block is a float16 d and 32 nibbles q, W = (q - 8) d, the first 16 weights in the low nibbles: exactly our int4
in groups of 32. A Q8_0 weight, an 8-bit code times a float16, can need 18 bits, so float16 rounds it by at most 2^-11
of its size. Embeddings, norms and head are dequantized to float16 whatever they are. llama.cpp orders the rows of q and
k by pairs that rotate together; that is undone. What a file is, its magic and its metadata say.

Source: https://github.com/ggml-org/ggml docs/gguf.md, https://github.com/ggml-org/llama.cpp convert_hf_to_gguf.py
(permute, rope_freqs) and ggml/src/ggml-quants.c (2026-06); the PyPI package gguf 0.19.0 reads and dequantizes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from toolchain import family
from toolchain.checkpoint import sample_into
from toolchain.errors import ArtifactError, PlanError
from toolchain.quantizers import layout
from toolchain.quantizers.foreign import gguf_metadata as metadata
from toolchain.quantizers.foreign.folder import DAMAGED, plain_units
from toolchain.quantizers.layout import Scheme
from toolchain.quantizers.shards import Unit
from toolchain.safetensors_file import Bytes, TensorPlan

NAME, GROUP = "gguf", 32
_ANOTHER_FILE = "Take the model's Q4_0, Q8_0, F16 or BF16 file, or its unquantized folder."
_PLAIN = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "Q8_0": "float16"}
_DTYPE = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_BLOCK_ROWS = 1024
_LARGEST_F16 = 65504.0


def gguf_name(name: str) -> str:
    """``model.layers.3.mlp.up_proj.weight`` -> ``blk.3.ffn_up.weight``."""
    if name in _OUTER:
        return _OUTER[name]
    _, _, layer, inside = name.split(".", 3)
    module, _, suffix = inside.rpartition(".")
    return f"blk.{layer}.{_NAMES[module]}.{suffix}"


class Gguf:
    """One such file, its metadata understood and its tensors checked by name, type and shape."""

    def __init__(self, file: Path) -> None:
        self.path = file
        self._opened = metadata.read(file)
        self.tensors = self._opened.tensors
        self.document: dict[str, Any] = metadata.config(self._opened)
        types = self._linear_types()
        self.kind = "Q4_0" if types == {"Q4_0"} else "plain"
        plain = {_PLAIN.get(one, "") for one in types}
        self.document["dtype"] = plain.pop() if len(plain) == 1 and self.kind == "plain" else "float16"
        self.config = family.read_config(self.document, str(file))
        self.scheme = Scheme("int4", GROUP, "modelopt", "fp16") if self.kind == "Q4_0" else None
        self._shapes = family.expected_tensors(self.config)
        self._check_names()

    def _linear_types(self) -> set[str]:
        """The types of the decoder layers' matrices. PlanError for those that we cannot hold as they are."""
        found = {kind: names[0] for kind, names in matrix_types(self._opened).items()}
        other = {kind: name for kind, name in found.items() if kind not in ("Q4_0", *_PLAIN)}
        if other or ("Q4_0" in found and len(found) > 1):
            kinds = ", ".join(f"{kind} ({name})" for kind, name in sorted((other or found).items()))
            raise PlanError(
                f"{self.path}: its matrices are {kinds}; read are files whose matrices are all Q4_0, or all of "
                f"{', '.join(_PLAIN)}",
                hint=_ANOTHER_FILE,
            )
        return set(found)

    def _check_names(self) -> None:
        wanted = {gguf_name(name): shape for name, shape in self._shapes.items()}
        if lost := sorted(set(wanted) - set(self.tensors)):
            raise ArtifactError(f"{self.path}: {len(lost)} tensors are missing: {', '.join(lost[:4])}", hint=DAMAGED)
        if strange := sorted(set(self.tensors) - set(wanted) - {"rope_freqs.weight", "output.weight"}):
            raise PlanError(
                f"{self.path}: holds tensors that a Llama does not have, so it would be computed wrongly: "
                f"{', '.join(strange[:4])}"
            )
        for name, shape in wanted.items():
            found = tuple(int(size) for size in reversed(self.tensors[name].shape))
            if found != shape:
                raise ArtifactError(f"{self.path}: {name} has shape {list(found)}; its metadata say {list(shape)}")

    @property
    def nbytes(self) -> int:
        return sum(int(tensor.n_bytes) for tensor in self.tensors.values())

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the file's size and samples; all metadata are near its beginning, but may be longer than those."""
        digest = hashlib.sha256(repr(sorted(self._opened.values.items())).encode())
        sample_into(digest, self.path)
        return digest.hexdigest()

    def side_files(self) -> dict[str, bytes]:
        """The tokenizer that the file holds, written by transformers. ArtifactError where that does not work."""
        return metadata.tokenizer(self.path)

    def units(self) -> list[Unit]:
        """What is to be written, layer by layer."""
        dtype = _DTYPE[self.config.dtype]
        if self.scheme is not None:
            return layout.units(self.config, lambda _name: dtype, self.scheme)
        return plain_units(self._shapes, lambda _name: dtype)

    def check(self, advance: Callable[[int], None]) -> None:
        """Every scale of Q4_0 must be a number."""
        for name, tensor in self.tensors.items():
            if tensor.tensor_type.name == "Q4_0" and not np.isfinite(_scales(tensor.data)).all():
                raise self._not_finite(name)
            advance(int(tensor.n_bytes))

    def read(self, plan: TensorPlan) -> Iterator[Bytes]:
        """One tensor of the layout, in pieces."""
        module, _, suffix = plan.name.rpartition(".")
        name = gguf_name(f"{module}.weight")
        rows = self._rows(module, self.tensors[name].data)
        if plan.dtype == "U8":
            for start in range(0, len(rows), _BLOCK_ROWS):
                yield _pack(_codes(rows[start : start + _BLOCK_ROWS])).reshape(-1)
        elif suffix == "weight_scale":
            yield np.ascontiguousarray(_scales(rows), np.float32).reshape(-1).view(np.uint8)
        else:
            for start in range(0, len(rows), _BLOCK_ROWS):
                yield self._floats(name, rows[start : start + _BLOCK_ROWS], plan.dtype)

    def _rows(self, module: str, data: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The rows of a tensor in the order of Hugging Face, quantized as they are."""
        heads = {"q_proj": self.config.num_heads, "k_proj": self.config.num_kv_heads}.get(module.rpartition(".")[2])
        return data if heads is None else data[row_order(len(data), heads)]

    def _floats(self, name: str, rows: npt.NDArray[Any], dtype: str) -> Bytes:
        """Rows of a tensor, dequantized to float32 and rounded to ``dtype``. ArtifactError for what it cannot hold."""
        import gguf

        try:
            wide = gguf.dequantize(rows, self.tensors[name].tensor_type)
        except NotImplementedError as error:
            kind = self.tensors[name].tensor_type.name
            raise PlanError(f"{self.path}: {name} is {kind}, which is not read", hint=_ANOTHER_FILE) from error
        largest = _LARGEST_F16 if dtype == "F16" else np.inf
        if not np.isfinite(wide).all() or (np.abs(wide) > largest).any():
            raise self._not_finite(name)
        if dtype == "BF16":
            bits = np.ascontiguousarray(wide, np.float32).view(np.uint32)
            narrow = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
        else:
            narrow = np.ascontiguousarray(wide, np.float16 if dtype == "F16" else np.float32)
        return narrow.reshape(-1).view(np.uint8)

    def _not_finite(self, name: str) -> ArtifactError:
        return ArtifactError(f"{self.path}: {name} holds numbers that float16 cannot, NaN or infinity", hint=DAMAGED)


def facts(file: Path) -> dict[str, Any]:
    """What can be said of the file."""
    opened = metadata.read(file)
    found = matrix_types(opened)
    kinds = sorted(found, key=lambda kind: -len(found[kind]))
    weights = "none" if set(kinds) <= set(_PLAIN) else "int4" if kinds == ["Q4_0"] else None
    becomes = {"none": ": plain weights", "int4": f": int4 in groups of {GROUP}", None: ""}[weights]
    return {
        "format": NAME,
        "title": f"llama.cpp GGUF, {' and '.join(kinds)}{becomes}",
        "producer": "llama.cpp",
        "weights": weights,
        "group_size": GROUP if weights == "int4" else None,
        "notes": _notes(opened, set(kinds)) if weights else (),
    }


def matrix_types(opened: metadata.Opened) -> dict[str, list[str]]:
    """Type -> names of the decoder layers' matrices that have it."""
    found: dict[str, list[str]] = {}
    for name, tensor in opened.tensors.items():
        if name.startswith("blk.") and name.endswith(".weight") and not name.endswith("norm.weight"):
            found.setdefault(tensor.tensor_type.name, []).append(name)
    return found


def _notes(opened: metadata.Opened, kinds: set[str]) -> tuple[str, ...]:
    """What importing rounds."""
    outer = ("token_embd.weight", "output.weight")
    told = [f"{name} ({opened.tensors[name].tensor_type.name})" for name in outer if name in opened.tensors]
    found = []
    if "Q8_0" in kinds:
        found.append("Q8_0 numbers have up to 18 significant bits: float16 rounds them by at most 2^-11 of their size")
    if kinds not in ({"F32"}, {"BF16"}):
        found.append(f"float16 afterwards: {', '.join(told)} and the norms")
    return tuple(found)


def row_order(rows: int, heads: int) -> npt.NDArray[np.int64]:
    """For each row of q or k as Hugging Face orders them, its place in a GGUF file.

    llama.cpp rotates neighbors (2i, 2i+1) of a head, Hugging Face its halves (i, i + half).
    """
    half = rows // heads // 2
    return np.arange(rows).reshape(heads, half, 2).swapaxes(1, 2).reshape(-1)


def _scales(rows: npt.NDArray[np.uint8]) -> npt.NDArray[np.float16]:
    """Q4_0 rows uint8 [n, in/32 * 18] -> the scale of each block, float16 [n, in/32]."""
    found: npt.NDArray[np.float16] = np.ascontiguousarray(rows.reshape(len(rows), -1, 18)[:, :, :2]).view("<f2")[
        :, :, 0
    ]
    return found


def _codes(rows: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Q4_0 rows uint8 [n, in/32 * 18] -> codes 0..15, uint8 [n, in]."""
    nibbles = rows.reshape(len(rows), -1, 18)[:, :, 2:]
    found: npt.NDArray[np.uint8] = np.concatenate((nibbles & 15, nibbles >> 4), axis=2).reshape(len(rows), -1)
    return found


def _pack(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Codes 0..15 around 8, [n, in] -> uint8 [n/2, in], two's complement, the even row in the low nibble."""
    signed = codes ^ np.uint8(8)
    return signed[0::2] | (signed[1::2] << np.uint8(4))
