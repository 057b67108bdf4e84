"""The Llama family: which models we take, what their configuration says, which tensors they have.

Llama 2 and 3, Mistral, TinyLlama and Qwen2: they differ in biases, rotary scaling, heads and tied embeddings. Reads a
Hugging Face ``config.json`` (transformers 4 and 5 spell a few keys differently) and refuses by name whatever the
backends would compute wrongly, and every key that ``facts/config_keys.yaml`` does not know. It reads no weights and
knows no device.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from toolchain import workspace
from toolchain.errors import PlanError

ATTENTION_IN = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
MLP_IN = ("mlp.gate_proj", "mlp.up_proj")
LINEARS = (*ATTENTION_IN, "self_attn.o_proj", *MLP_IN, "mlp.down_proj")
"""The quantized matrices of a decoder layer, in the order of the forward pass (HF module names)."""

SHARED_INPUT = (ATTENTION_IN, ("self_attn.o_proj",), MLP_IN, ("mlp.down_proj",))
"""``LINEARS`` in groups that read the same activation: one GEMM in TensorRT-LLM, so they share fp8 scales."""

NORMS = ("input_layernorm", "post_attention_layernorm")

_MODEL_TYPES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral", "Qwen2ForCausalLM": "qwen2"}
"""Architecture -> the ``model_type`` that transformers chooses the same class by."""

_DEFAULTS: dict[str, dict[str, int]] = {
    "LlamaForCausalLM": {"max_position_embeddings": 2048},
    "MistralForCausalLM": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "Qwen2ForCausalLM": {"max_position_embeddings": 32768, "num_key_value_heads": 32},
}
"""What a key that is not there stands for (the configuration classes of transformers 4.57.6 and 5.23.0)."""

_ROPE_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""The kinds of rotary scaling that we compute, and the numbers that each needs."""

_SHOWN_CHARACTERS = 60


@dataclass(frozen=True)
class RopeScaling:
    """Rotary position scaling. ``kind`` is ``"linear"`` (only ``factor``) or ``"llama3"``."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class LlamaConfig:
    """What the arithmetic of a Llama needs, and nothing about how its weights are stored."""

    architecture: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tied_embeddings: bool
    dtype: str
    """``"float16"``, ``"bfloat16"`` or ``"float32"``."""
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    biased: tuple[str, ...] = ()
    """Those of ``LINEARS`` whose product gets a ``bias`` [out] added."""

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def dtype_bytes(self) -> int:
        return 4 if self.dtype == "float32" else 2


def published(name: str) -> LlamaConfig | None:
    """The configuration of a model that ``facts/models.yaml`` knows by its hub name, or None."""
    entry = workspace.facts("models").get(name.removeprefix("hf:"))
    return read_config(entry["config"], f"facts/models.yaml: {name}") if entry else None


def linear_shape(config: LlamaConfig, linear: str) -> tuple[int, int]:
    """The shape [out_features, in_features] of one of ``LINEARS``."""
    hidden, inner = config.hidden_size, config.intermediate_size
    return {
        "self_attn.q_proj": (config.q_size, hidden),
        "self_attn.k_proj": (config.kv_size, hidden),
        "self_attn.v_proj": (config.kv_size, hidden),
        "self_attn.o_proj": (hidden, config.q_size),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }[linear]


def layer_linears(config: LlamaConfig) -> Iterator[tuple[int, str]]:
    """Every (layer, linear), layer by layer."""
    return ((layer, linear) for layer in range(config.num_layers) for linear in LINEARS)


def linear_name(layer: int, linear: str) -> str:
    """``(3, "mlp.up_proj")`` -> ``"model.layers.3.mlp.up_proj"``; add ``.weight``, ``.weight_scale`` and so on."""
    return f"model.layers.{layer}.{linear}"


def kept_tensors(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Name within a decoder layer -> shape of what no quantization touches: the norms and the biases."""
    shapes: dict[str, tuple[int, ...]] = {f"{norm}.weight": (config.hidden_size,) for norm in NORMS}
    return shapes | {f"{linear}.bias": linear_shape(config, linear)[:1] for linear in config.biased}


def layer_tensors(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Name within a decoder layer -> shape of all that an unquantized layer computes with."""
    return kept_tensors(config) | {f"{linear}.weight": linear_shape(config, linear) for linear in LINEARS}


def expected_tensors(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the unquantized model; ``lm_head.weight`` only where it is not tied."""
    hidden = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in layer_tensors(config).items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config.tied_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def read_config(config: Mapping[str, Any], where: str) -> LlamaConfig:
    """A parsed ``config.json`` -> LlamaConfig. ``where`` names the file in messages.

    Raises PlanError that lists everything about the model that we would compute wrongly.
    """
    try:
        names = config.get("architectures") or [""]
        whole = {**_DEFAULTS.get(str(names[0]), {}), **config}
        refusals = list(_refusals(whole, str(names[0])))
        if not refusals:
            return _read(whole)
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise PlanError(
            f"{where}: a key of the model's configuration is missing or has the wrong type: {error}",
            hint="Is this config.json the one that was published with the weights?",
        ) from error
    raise PlanError(
        f"{where}: this model is not one that scalellm can run: " + "; ".join(refusals),
        hint="scalellm runs Llama-2, Llama-3, Mistral and Qwen2-style models without sliding window "
        "(architectures " + ", ".join(_MODEL_TYPES) + ").\n"
        "A key that we do not know and that only a training tool left there can be taken out of config.json.",
    )


def end_ids(eos: Any) -> tuple[int, ...]:
    """``eos_token_id`` as transformers writes it, a number, a list or null, -> all ids that end an answer."""
    return tuple(int(one) for one in eos) if isinstance(eos, list) else () if eos is None else (int(eos),)


def _read(config: Mapping[str, Any]) -> LlamaConfig:
    architecture, heads = config["architectures"][0], int(config["num_attention_heads"])
    rope = _rope(config)
    return LlamaConfig(
        architecture=architecture,
        hidden_size=int(config["hidden_size"]),
        intermediate_size=int(config["intermediate_size"]),
        num_layers=int(config["num_hidden_layers"]),
        num_heads=heads,
        num_kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or int(config["hidden_size"]) // heads),
        vocab_size=int(config["vocab_size"]),
        max_position_embeddings=int(config["max_position_embeddings"]),
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
        rope_scaling=_rope_scaling(rope),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        dtype=_dtype(config),
        bos_token_id=config.get("bos_token_id"),
        eos_token_ids=end_ids(config.get("eos_token_id")),
        biased=_biased(architecture, bool(config.get("attention_bias"))),
    )


def _biased(architecture: str, attention_bias: bool) -> tuple[str, ...]:
    """Qwen2 always has biases in front of attention, and no key for them; Llama where ``attention_bias`` says so.

    Source: modeling_qwen2.py and modeling_llama.py, transformers 5.23.0.
    """
    if architecture == "Qwen2ForCausalLM":
        return ATTENTION_IN
    return (*ATTENTION_IN, "self_attn.o_proj") if attention_bias else ()


def _dtype(config: Mapping[str, Any]) -> str:
    return str(config.get("dtype") or config.get("torch_dtype") or "float16")


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """transformers 5 writes ``rope_parameters``, transformers 4 ``rope_scaling`` (null for plain RoPE)."""
    return config.get("rope_scaling") or config.get("rope_parameters") or {}


def _rope_kind(rope: Mapping[str, Any]) -> str:
    return str(rope.get("rope_type") or rope.get("type") or "default")


def _rope_scaling(rope: Mapping[str, Any]) -> RopeScaling | None:
    kind = _rope_kind(rope)
    if kind == "default":
        return None
    numbers = {key: float(rope[key]) for key in _ROPE_KEYS[kind]}
    context = int(numbers.pop("original_max_position_embeddings", RopeScaling.original_max_position_embeddings))
    return RopeScaling(kind, original_max_position_embeddings=context, **numbers)


_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
"""Keys that every configuration of our families has."""


def _refusals(config: Mapping[str, Any], architecture: str) -> Iterator[str]:
    """Everything in a configuration that our graphs do not compute, each in a few words."""
    if architecture not in _MODEL_TYPES:
        yield f"its architecture is {architecture}" if architecture else "it names no architecture"
        if not {*_SIZES} <= {*config}:  # of a family with keys of its own
            return
    elif config.get("model_type", _MODEL_TYPES[architecture]) != _MODEL_TYPES[architecture]:
        yield f"its architecture is {architecture} and its model_type {config['model_type']}"
    if config.get("attention_bias") and architecture != "LlamaForCausalLM":
        yield f"attention_bias: true means something of its own with {architecture or 'an unknown architecture'}"
    if wrong := [f"{key}: {config[key]!r}" for key in _SIZES if config[key] < 1]:
        yield f"its sizes are no whole numbers from 1 ({', '.join(wrong)})"
        return
    heads, kv_heads = config["num_attention_heads"], config.get("num_key_value_heads")
    if kv_heads and heads % kv_heads:
        yield f"its {heads} attention heads are no multiple of its {kv_heads} key and value heads"
    yield from _window_refusals(config, architecture)
    yield from _rope_refusals(config)
    if _dtype(config) not in ("float16", "bfloat16", "float32"):
        yield f"its dtype is {_dtype(config)}"
    yield from _key_refusals(config)


def _window_refusals(config: Mapping[str, Any], architecture: str) -> Iterator[str]:
    """Qwen2 has a window only where ``use_sliding_window`` says so, which ``_key_refusals`` refuses."""
    window = config.get("sliding_window")
    if window and window < config.get("max_position_embeddings", window + 1) and architecture != "Qwen2ForCausalLM":
        yield f"it uses sliding-window attention (sliding_window: {window})"
    if other := sorted(set(config.get("layer_types") or ()) - {"full_attention"}):
        yield f"some of its layers are not full attention (layer_types: {', '.join(other)})"


def _rope_refusals(config: Mapping[str, Any]) -> Iterator[str]:
    if config.get("rope_scaling") and config.get("rope_parameters"):
        yield "it has both rope_scaling and rope_parameters"
    rope = _rope(config)
    kind = _rope_kind(rope)
    if kind not in _ROPE_KEYS:
        yield f"its rotary scaling is {kind!r} (known: {', '.join(_ROPE_KEYS)})"
        return
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *_ROPE_KEYS[kind]}
    for key, value in rope.items():
        if value is not None and key not in known:
            yield f"its rotary scaling {kind!r} has a key that we do not know, {key}: {_shown(value)}"
    if (rope.get("partial_rotary_factor") or 1.0) != 1.0:
        yield "only a part of each head is rotated (partial_rotary_factor)"


def _key_refusals(config: Mapping[str, Any]) -> Iterator[str]:
    """By name and value: keys that have one value only with us, and keys that nobody here has heard of."""
    table = workspace.facts("config_keys")
    harmless = {*table["read"], *(key for group in table["ignored"] for key in group["keys"])}
    for key, value in config.items():
        if value is None or key in harmless:
            continue
        if key not in table["only"]:
            yield f"its configuration has a key that we do not know, {key}: {_shown(value)}"
        elif value != table["only"][key]:
            yield f"{key} is {_shown(value)}, and we compute {_shown(table['only'][key])} only"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
