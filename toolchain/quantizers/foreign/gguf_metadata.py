"""The metadata of a GGUF file of the architecture ``llama``, as a Hugging Face ``config.json``, and its tokenizer.

Every key under ``llama.`` must be one that is understood; the first other one refuses the file. The rotary factors of
Llama 3 stand in a tensor, not in keys, and are recognized by computing them again.

Source: https://github.com/ggml-org/ggml docs/gguf.md and gguf 0.19.0 constants.py (2026-11); the factors:
https://github.com/ggml-org/llama.cpp convert_hf_to_gguf.py, LlamaModel.generate_extra_tensors (2026-06).
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from toolchain.checkpoint import SIDE_FILES
from toolchain.errors import ArtifactError, PlanError
from toolchain.quantizers.foreign.folder import DAMAGED

MAGIC = b"GGUF"
_INSTALL = "pip install 'scalellm-toolchain[import]'"
_KNOWN = {
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "vocab_size",
    "tensor_data_layout",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.layer_norm_rms_epsilon",
    "attention.key_length",
    "attention.value_length",
}
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Of all published Llama 3.1, 3.2 and 3.3 models; only ``factor`` differs (their config.json, 2026-11)."""


@dataclass(frozen=True)
class Opened:
    """A GGUF file: its plain metadata, and its tensors by name, mapped."""

    path: Path
    values: dict[str, Any]
    tensors: dict[str, Any]


def is_gguf(file: Path) -> bool:
    """By the four bytes that it begins with."""
    try:
        with file.open("rb") as stream:
            return stream.read(4) == MAGIC
    except OSError:
        return False


def read(file: Path) -> Opened:
    """Open a file. ArtifactError where it is damaged or cut off, PlanError for one part of several."""
    try:
        import gguf
    except ImportError as error:
        raise ArtifactError(f"{file}: GGUF files need the Python package gguf to be read", hint=_INSTALL) from error
    try:
        reader = gguf.GGUFReader(file)
        values = {
            name: one.contents() for name, one in reader.fields.items() if not name.startswith("tokenizer.ggml.t")
        }
    except (ValueError, KeyError, IndexError, TypeError, OSError, OverflowError) as error:
        raise ArtifactError(f"{file}: damaged or cut off: {error}", hint=DAMAGED) from error
    if values.get("split.count", 1) > 1:
        raise PlanError(
            f"{file}: one of {values['split.count']} parts of a GGUF file",
            hint="Join the parts first: llama-gguf-split --merge FIRST-PART OUT.gguf",
        )
    return Opened(file, values, {tensor.name: tensor for tensor in reader.tensors})


def config(opened: Opened) -> dict[str, Any]:
    """The keys of a Hugging Face ``config.json``, but for ``dtype``. PlanError for what we would compute wrongly."""
    values = opened.values
    architecture = values.get("general.architecture")
    if architecture != "llama":
        raise PlanError(f"{opened.path}: its architecture is {architecture!r}; read is 'llama'")
    strange = [key for key in values if key.startswith("llama.") and key.removeprefix("llama.") not in _KNOWN]
    if strange:
        raise PlanError(f"{opened.path}: has the key {strange[0]} = {values[strange[0]]}, which scalellm does not know")
    try:
        return _config(opened)
    except KeyError as error:
        raise ArtifactError(f"{opened.path}: its metadata lack {error}", hint=DAMAGED) from error


def _config(opened: Opened) -> dict[str, Any]:
    values = {key.removeprefix("llama."): value for key, value in opened.values.items() if key.startswith("llama.")}
    heads = int(values["attention.head_count"])
    head_dim = int(values.get("attention.key_length", int(values["embedding_length"]) // heads))
    if head_dim != values.get("attention.value_length", head_dim) or head_dim != values.get(
        "rope.dimension_count", head_dim
    ):
        raise PlanError(f"{opened.path}: its keys, values and rotation have different sizes in a head")
    theta = float(values.get("rope.freq_base", 10000.0))
    found = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": int(values["embedding_length"]),
        "intermediate_size": int(values["feed_forward_length"]),
        "num_hidden_layers": int(values["block_count"]),
        "num_attention_heads": heads,
        "num_key_value_heads": int(values.get("attention.head_count_kv", heads)),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "vocab_size": int(opened.tensors["token_embd.weight"].shape[1]),
        "max_position_embeddings": int(values["context_length"]),
        "rms_norm_eps": float(values["attention.layer_norm_rms_epsilon"]),
        "rope_theta": theta,
        "rope_scaling": _scaling(opened, values, theta, head_dim),
        "tie_word_embeddings": "output.weight" not in opened.tensors,
        "attention_bias": False,
        "mlp_bias": False,
    }
    ends = [opened.values.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    known = list(dict.fromkeys(int(one) for one in ends if one is not None))
    bos = opened.values.get("tokenizer.ggml.bos_token_id")
    tokens = {"bos_token_id": None if bos is None else int(bos), "eos_token_id": known[0] if len(known) == 1 else known}
    return {**found, **{key: value for key, value in tokens.items() if value not in (None, [])}}


def _scaling(opened: Opened, values: dict[str, Any], theta: float, head_dim: int) -> dict[str, Any] | None:
    kind = values.get("rope.scaling.type", "none")
    factor = float(values.get("rope.scaling.factor", 1.0) or 1.0)
    tensor = opened.tensors.get("rope_freqs.weight")
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor} if factor != 1.0 else None
    if kind != "none":
        raise PlanError(
            f"{opened.path}: its rotary scaling is {kind!r}; read are 'none', 'linear' and Llama 3's factors"
        )
    if tensor is None or (np.asarray(tensor.data) == 1).all():
        return None
    stored = np.asarray(tensor.data, np.float64)
    wanted = llama3_factors(theta, head_dim, float(stored.max()))
    if stored.shape != wanted.shape or not np.allclose(stored, wanted, rtol=1e-4):
        raise PlanError(f"{opened.path}: rope_freqs.weight holds rotary factors that are not those of a Llama 3")
    return {"rope_type": "llama3", "factor": float(stored.max()), **_LLAMA3}


def llama3_factors(theta: float, head_dim: int, factor: float) -> npt.NDArray[np.float64]:
    """What Llama 3's scaling divides each frequency by: [head_dim / 2].

    1 for wavelengths below 8192 / 4, ``factor`` for those above 8192 / 1, and between them a smooth way from one to the
    other (transformers modeling_rope_utils.py, _compute_llama3_parameters, 2026-11).
    """
    low, high, known = _LLAMA3.values()
    length = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((known / length - low) / (high - low), 0, 1)
    found: npt.NDArray[np.float64] = 1 / ((1 - smooth) / factor + smooth)
    return found


def tokenizer(file: Path) -> dict[str, bytes]:
    """The files of the tokenizer inside, as transformers saves it. ArtifactError where it does not understand it."""
    hint = "Name a folder that has the model's tokenizer: --tokenizer DIR"
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ArtifactError(
            f"{file}: its tokenizer needs transformers to be read", hint=f"{_INSTALL}\n{hint}"
        ) from error
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = AutoTokenizer.from_pretrained(file.absolute().parent, gguf_file=file.name)
            found.save_pretrained(folder)
        except Exception as error:
            told = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise ArtifactError(f"{file}: transformers does not read its tokenizer: {told}", hint=hint) from error
        return {name: (Path(folder) / name).read_bytes() for name in SIDE_FILES if (Path(folder) / name).is_file()}
