"""A folder of weights in the Hugging Face layout, opened and checked, with nothing loaded.

Unquantized models and the unified quantized layout (``hf_quant_config.json``) are both read here; both may be sharded.
Bytes are handed out as read-only views of the mapped files, and their pages can be given back, so a caller's memory
stays bounded by the tensor in hand. It knows no torch and does no arithmetic.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from toolchain import family
from toolchain.errors import ArtifactError, PlanError
from toolchain.family import LlamaConfig
from toolchain.quantization import weights_of
from toolchain.safetensors_file import DTYPE_BYTES

SIDE_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files that travel with the weights into every later artifact, where the model has them."""

KV_RANGES = "scalellm_kv_cache.json"
"""Our own file beside the layout's, which has no place for INT8 caches, written when a model is calibrated:
``{"layers": [{"k_amax": ..., "v_amax": ...}, ...]}``, the largest |K| after rotation and |V| that were seen. An INT8
cache has scale amax/127, an FP8 one amax/448. JSON, because some loaders take every safetensors file for weights."""

_HEADER_LIMIT = 100 * 2**20
_SAMPLES = 64
_SAMPLE_BYTES = 4096


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies."""

    name: str
    dtype: str
    """The safetensors name: ``"F16"``, ``"BF16"``, ``"F32"``, ``"F8_E4M3"``, ``"U8"`` ..."""
    shape: tuple[int, ...]
    file: Path
    offset: int
    """From the start of the file."""
    nbytes: int


@dataclass(frozen=True)
class CheckpointQuantization:
    """The ``quantization`` object of ``hf_quant_config.json`` (ModelOpt, unified_export_hf.py, December 2025)."""

    quant_algo: str | None
    kv_cache_quant_algo: str | None
    group_size: int | None = None
    has_zero_point: bool = False
    pre_quant_scale: bool = False


class Checkpoint:
    """A checked folder of weights. ``tensors`` maps each name to where it lies."""

    def __init__(
        self,
        path: Path,
        config: LlamaConfig,
        tensors: dict[str, TensorInfo],
        quantization: CheckpointQuantization | None,
    ) -> None:
        self.path = path
        self.config = config
        self.tensors = tensors
        self.quantization = quantization
        self._maps: dict[Path, mmap.mmap] = {}

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Check a folder: its configuration, every header against its file's size, every expected name and shape.

        Raises ArtifactError naming the file at fault, PlanError for a model outside the Llama family.
        """
        raw = read_json(path / "config.json", hint="Give the folder of a Hugging Face model: --model DIR")
        quantization = _quantization(path, raw)
        config = _with_end_ids(path, family.read_config(raw, str(path / "config.json")))
        tensors = read_headers(path)
        _check_names(path, config, tensors, quantization)
        return cls(path, config, tensors, quantization)

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def side_files(self) -> list[Path]:
        """The tokenizer's files and the generation configuration, as far as the folder has them."""
        return [self.path / name for name in SIDE_FILES if (self.path / name).is_file()]

    @cached_property
    def kv_ranges(self) -> list[tuple[float, float]] | None:
        """max |K| after rotation and max |V| of each layer, or None for a checkpoint that was not calibrated.

        Raises ArtifactError when the file is damaged or belongs to another model.
        """
        file = self.path / KV_RANGES
        if not file.is_file():
            return None
        try:
            ranges = [(float(layer["k_amax"]), float(layer["v_amax"])) for layer in read_json(file)["layers"]]
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"{file}: does not hold a k_amax and v_amax for each layer: {error}") from error
        if len(ranges) != self.config.num_layers:
            raise ArtifactError(f"{file}: holds {len(ranges)} layers, the model has {self.config.num_layers}")
        if not all(0 <= value < math.inf for pair in ranges for value in pair):
            raise ArtifactError(f"{file}: holds a range that is negative or not a number")
        return ranges

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the configuration, the headers, and samples of every file (first, last and 64 places between).

        Reading all of a 26 GB model to name it would cost as much as quantizing it; training changes every sample.
        """
        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        for side in self.side_files:
            digest.update(side.name.encode() + side.read_bytes())
        ranges = self.path / KV_RANGES
        if ranges.is_file():
            digest.update(ranges.read_bytes())
        for file in sorted({info.file for info in self.tensors.values()}):
            sample_into(digest, file)
        return digest.hexdigest()

    def bytes_of(self, name: str) -> npt.NDArray[np.uint8]:
        """The tensor's bytes as a read-only flat view of the mapped file: [nbytes] uint8, little endian, row major."""
        info = self.tensors[name]
        view = np.frombuffer(self._map(info.file), dtype=np.uint8, count=info.nbytes, offset=info.offset)
        return view

    def release(self, name: str) -> None:
        """Give the tensor's whole pages back to the system. Views stay valid; touching them reads the file again."""
        info = self.tensors[name]
        page = mmap.PAGESIZE
        start = -(-info.offset // page) * page
        length = (info.offset + info.nbytes) // page * page - start
        if length > 0 and info.file in self._maps:
            self._maps[info.file].madvise(mmap.MADV_DONTNEED, start, length)

    def release_all(self) -> None:
        """The same of every tensor. A kernel that maps large folios whole (seen on Linux 6.18) maps pages of the
        tensors next to the one that is read, too, and no release of that one gives them back.
        """
        for mapped in self._maps.values():
            mapped.madvise(mmap.MADV_DONTNEED)

    def _map(self, file: Path) -> mmap.mmap:
        if file not in self._maps:
            with file.open("rb") as stream:
                self._maps[file] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[file]


def _with_end_ids(path: Path, config: LlamaConfig) -> LlamaConfig:
    """The ids that end an answer are those of ``generation_config.json`` where it names any, as in transformers.

    Instruction-tuned models often name more there than in ``config.json`` (Llama 3, Qwen2.5).
    """
    file = path / "generation_config.json"
    eos = read_json(file).get("eos_token_id") if file.is_file() else None
    try:
        return replace(config, eos_token_ids=family.end_ids(eos)) if eos is not None else config
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"{file}: eos_token_id is neither a number nor a list of numbers: {eos!r}") from error


def sample_into(digest: hashlib._Hash, file: Path) -> None:
    """Update a digest with a file's name, size and samples: its first and last bytes and 63 places between."""
    size = file.stat().st_size
    digest.update(f"{file.name}:{size}".encode())
    with file.open("rb") as stream:
        for place in range(_SAMPLES + 1):
            stream.seek(max(0, (size - _SAMPLE_BYTES) * place // _SAMPLES))
            digest.update(stream.read(_SAMPLE_BYTES))


def read_json(path: Path, *, hint: str = "") -> dict[str, Any]:
    """A JSON object from a file. ArtifactError that names the file when it is missing or not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: no such file", hint=hint) from error
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: not readable as JSON: {error}", hint=hint) from error
    if not isinstance(value, dict):
        raise ArtifactError(f"{path}: holds a JSON {type(value).__name__}, not an object", hint=hint)
    return value


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file. ArtifactError when it is not one, or is shorter or longer than it says.

    Format: 8 bytes little-endian header length, JSON header, data
    (https://huggingface.co/docs/safetensors, 2026-11-01).
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8).ljust(8, b"\0"))
            if not 2 <= length <= min(_HEADER_LIMIT, size - 8):
                raise ArtifactError(f"{file}: not a safetensors file, or cut off within its header ({size} bytes)")
            header = json.loads(stream.read(length))
        if not isinstance(header, dict):
            raise ValueError(f"it is a JSON {type(header).__name__}, not an object")
        header.pop("__metadata__", None)
        tensors = {name: _tensor_info(file, name, entry, 8 + length) for name, entry in header.items()}
    except FileNotFoundError as error:
        raise ArtifactError(f"{file}: no such file, though the index names it", hint="Download it again.") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{file}: its safetensors header is damaged: {error}", hint="Download it again.") from error
    end = max((info.offset + info.nbytes for info in tensors.values()), default=8 + length)
    if size != end:
        word = "truncated" if size < end else "longer than it should be"
        raise ArtifactError(
            f"{file}: {word}: it has {size} bytes and its header promises {end}", hint="Download or copy it again."
        )
    return tensors


def _tensor_info(file: Path, name: str, entry: Mapping[str, Any], base: int) -> TensorInfo:
    begin, end = entry["data_offsets"]
    dtype, shape = entry["dtype"], tuple(entry["shape"])
    if not all(isinstance(number, int) and number >= 0 for number in (begin, end, *shape)):
        raise ValueError(f"{name}: sizes and offsets must be whole numbers")
    if end - begin != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise ValueError(f"{name}: {end - begin} bytes do not hold {dtype} {list(shape)}")
    return TensorInfo(name, dtype, shape, file, base + begin, end - begin)


def read_headers(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a folder, by its index or from its one file. ArtifactError that names the file at fault."""
    index = path / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ArtifactError(f"{index}: has no weight_map")
        files = [path / str(name) for name in sorted(set(weight_map.values()))]
    elif (path / "model.safetensors").exists():
        weight_map, files = None, [path / "model.safetensors"]
    else:
        pickled = any(path.glob("*.bin")) or any(path.glob("*.pth"))
        raise ArtifactError(
            f"{path}: has no model.safetensors" + (" (only pickled weights, which can run code)" if pickled else ""),
            hint="Use the safetensors version of the model"
            + (f", or convert it without running code: scalellm import {path} OUT" if pickled else ""),
        )
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        tensors |= read_header(file)
    if weight_map and (lost := sorted(set(weight_map) - set(tensors))):
        raise ArtifactError(f"{path}: the index promises tensors that no file has: {_some(lost)}")
    if weight_map is not None:
        _check_places(index, weight_map, tensors)
    return tensors


def _check_places(index: Path, weight_map: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
    """Every tensor is in the file that the index says, and none is there that it does not name: others would not be
    seen by a loader that trusts the index."""
    if hidden := sorted(set(tensors) - set(weight_map)):
        file = tensors[hidden[0]].file
        raise ArtifactError(
            f"{index}: does not name tensors that {file.name} holds: {_some(hidden)}",
            hint="The index belongs to other files: download or copy the model again.",
        )
    if moved := sorted(name for name, info in tensors.items() if info.file.name != Path(str(weight_map[name])).name):
        info = tensors[moved[0]]
        raise ArtifactError(
            f"{index}: says that {moved[0]} is in {weight_map[moved[0]]}, and it is in {info.file.name}",
            hint="The index belongs to other files: download or copy the model again.",
        )


def _quantization(path: Path, config: Mapping[str, Any]) -> CheckpointQuantization | None:
    """From ``hf_quant_config.json``. PlanError when the folder is quantized in a way that we do not read."""
    file = path / "hf_quant_config.json"
    if not file.exists():
        foreign = config.get("quantization_config")
        if foreign:
            raise PlanError(
                f"{path}: already quantized ({foreign.get('quant_method', 'unknown method')}), in another layout than "
                "NVIDIA ModelOpt's unified one",
                hint=f"scalellm inspect {path}   # says whether it can be imported",
            )
        return None
    raw = read_json(file).get("quantization", {})
    found = CheckpointQuantization(
        quant_algo=raw.get("quant_algo"),
        kv_cache_quant_algo=raw.get("kv_cache_quant_algo"),
        group_size=raw.get("group_size"),
        has_zero_point=bool(raw.get("has_zero_point")),
        pre_quant_scale=bool(raw.get("pre_quant_scale")),
    )
    if weights_of(found.quant_algo) is None or found.has_zero_point:
        raise PlanError(
            f"{file}: quantized as {found.quant_algo}{' with zero points' * found.has_zero_point}, "
            "which scalellm does not read",
        )
    return found


def quantized_shapes(
    config: LlamaConfig, quantization: CheckpointQuantization | None
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (safetensors dtype or "" for any float, shape) of every obligatory tensor of a checkpoint.

    int4: weight U8 [out/2, in], weight_scale F32 [out, in/group]; W4A8 also weight_scale_2 and input_scale F32 [].
    int8: weight I8 [out, in], weight_scale F32 [out]; SmoothQuant also input_scale F32 [] and pre_quant_scale [in].
    fp8: weight F8_E4M3 [out, in], weight_scale F32 [].
    """
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        name: ("", shape) for name, shape in family.expected_tensors(config).items()
    }
    algo = quantization.quant_algo if quantization else None
    if algo is None or quantization is None:
        return shapes
    group = quantization.group_size or 128
    for layer, linear in family.layer_linears(config):
        name = family.linear_name(layer, linear)
        of_linear = _linear_shapes(algo, *family.linear_shape(config, linear), group)
        shapes |= {f"{name}.{suffix}": kind for suffix, kind in of_linear.items()}
    return shapes


def _linear_shapes(algo: str, rows: int, columns: int, group: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The obligatory tensors of one linear layer [rows, columns], by suffix."""
    found: dict[str, tuple[str, tuple[int, ...]]]
    if algo == "FP8":
        return {"weight": ("F8_E4M3", (rows, columns)), "weight_scale": ("F32", ())}
    if algo in ("W8A16", "W8A8_SQ_PER_CHANNEL"):
        found = {"weight": ("I8", (rows, columns)), "weight_scale": ("F32", (rows,))}
        if algo == "W8A8_SQ_PER_CHANNEL":
            found |= {"input_scale": ("F32", ()), "pre_quant_scale": ("", (columns,))}
        return found
    found = {"weight": ("U8", (rows // 2, columns)), "weight_scale": ("F32", (rows, columns // group))}
    if algo == "W4A8_AWQ":
        found |= {"weight_scale_2": ("F32", ()), "input_scale": ("F32", ())}
    return found


_OPTIONAL_SUFFIXES = (".input_scale", ".pre_quant_scale", ".k_scale", ".v_scale")


def _check_names(
    path: Path, config: LlamaConfig, tensors: Mapping[str, TensorInfo], quantization: CheckpointQuantization | None
) -> None:
    expected = quantized_shapes(config, quantization)
    if lost := sorted(set(expected) - set(tensors)):
        raise ArtifactError(f"{path}: {len(lost)} tensors are missing: {_some(lost)}")
    for name, (dtype, shape) in expected.items():
        info = tensors[name]
        if info.shape != shape:
            raise ArtifactError(f"{info.file}: {name} has shape {list(info.shape)}; config.json says {list(shape)}")
        if info.dtype != dtype if dtype else info.dtype not in ("F16", "BF16", "F32"):
            raise ArtifactError(f"{info.file}: {name} is {info.dtype}, not {dtype or 'a 16- or 32-bit float'}")
    ignored = ("rotary_emb.inv_freq", *(_OPTIONAL_SUFFIXES if quantization else ()))
    unknown = sorted(name for name in set(tensors) - set(expected) - {"lm_head.weight"} if not name.endswith(ignored))
    if unknown:
        raise PlanError(
            f"{path}: holds tensors that a {config.architecture} with this config.json does not have, so it would be "
            f"computed wrongly: {_some(unknown)}"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


_DOWNLOAD = ("*.safetensors", "*.json", "tokenizer.model", "*.jinja")


def is_hub_name(source: str) -> bool:
    """Whether ``source`` has the form ``hf:ORG/NAME`` or ``ORG/NAME`` rather than that of a path."""
    return source.removeprefix("hf:").count("/") == 1 and not source.startswith((".", "/", "~"))


def find(source: str) -> Path | None:
    """The model's folder (or GGUF file) if it is on this machine: of that name, or in the Hugging Face cache."""
    folder = Path(source).expanduser()
    if folder.exists():
        return folder
    if not is_hub_name(source) or not _in_cache(source):
        return None
    try:
        return _snapshot(source, local_files_only=True)
    except (ArtifactError, OSError):
        return None


def _in_cache(source: str) -> bool:
    """Whether the Hugging Face cache has a folder of this name. Cheap: the library that reads it takes long to load."""
    try:
        from huggingface_hub.constants import HF_HUB_CACHE
    except ImportError:
        return False
    return (Path(HF_HUB_CACHE) / f"models--{source.removeprefix('hf:').replace('/', '--')}").is_dir()


def download(source: str) -> Path:
    """``find``, else fetch from the Hugging Face hub (safetensors, JSON and tokenizer files; resumes by itself).

    Raises ArtifactError with the ways out when that does not work.
    """
    folder = find(source)
    if folder is not None:
        return folder
    if not is_hub_name(source):
        raise ArtifactError(f"{source}: no such folder", hint="Name the folder of a Hugging Face model: --model DIR")
    name = source.removeprefix("hf:")
    try:
        return _snapshot(source, local_files_only=False)
    except OSError as error:  # every hub error is one: no network, no such model, no permission
        raise ArtifactError(
            f"{name}: not on this machine, and the Hugging Face hub did not give it ({type(error).__name__})",
            hint=f"Name a local folder: --model DIR\nor fetch it first: hf download {name}   "
            "(some models ask for: hf auth login)",
        ) from error


def _snapshot(source: str, *, local_files_only: bool) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ArtifactError(
            f"{source}: not a local folder, and huggingface_hub is not installed",
            hint="Name a local folder: --model DIR   or: pip install 'scalellm-toolchain[quantize]'",
        ) from error
    name = source.removeprefix("hf:")
    return Path(snapshot_download(name, allow_patterns=list(_DOWNLOAD), local_files_only=local_files_only))
