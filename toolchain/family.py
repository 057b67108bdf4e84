"""The Llama family: which models we take, what their configuration says, which tensors they have.

Reads a Hugging Face ``config.json`` (transformers 4 and 5 spell a few keys differently) and refuses by name whatever
the backends would compute wrongly. It reads no weights and knows no device.
"""

from __future__ import annotations

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

_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")
_ROPE_KINDS = ("llama3", "linear")


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


def expected_tensors(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the unquantized model; ``lm_head.weight`` only where it is not tied."""
    hidden = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_layers):
        shapes |= {f"model.layers.{layer}.{norm}.weight": (hidden,) for norm in NORMS}
        shapes |= {f"{linear_name(layer, linear)}.weight": linear_shape(config, linear) for linear in LINEARS}
    shapes["model.norm.weight"] = (hidden,)
    if not config.tied_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def read_config(config: Mapping[str, Any], where: str) -> LlamaConfig:
    """A parsed ``config.json`` -> LlamaConfig. ``where`` names the file in messages.

    Raises PlanError that lists everything about the model that we would compute wrongly.
    """
    refusals = list(_refusals(config))
    if refusals:
        raise PlanError(
            f"{where}: this model is not one that scalellm can run: " + "; ".join(refusals),
            hint="scalellm runs Llama-2, Llama-3 and Mistral-style models without sliding window "
            "(architectures " + ", ".join(_ARCHITECTURES) + ").",
        )
    try:
        return _read(config)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise PlanError(
            f"{where}: a key of the model's configuration is missing or has the wrong type: {error}",
            hint="Is this config.json the one that was published with the weights?",
        ) from error


def _read(config: Mapping[str, Any]) -> LlamaConfig:
    heads = int(config["num_attention_heads"])
    rope = _rope(config)
    eos = config.get("eos_token_id")
    return LlamaConfig(
        architecture=config["architectures"][0],
        hidden_size=int(config["hidden_size"]),
        intermediate_size=int(config["intermediate_size"]),
        num_layers=int(config["num_hidden_layers"]),
        num_heads=heads,
        num_kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or int(config["hidden_size"]) // heads),
        vocab_size=int(config["vocab_size"]),
        max_position_embeddings=int(config.get("max_position_embeddings", 2048)),
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
        rope_scaling=_rope_scaling(rope),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "float16"),
        bos_token_id=config.get("bos_token_id"),
        eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (int(eos),),
    )


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """transformers 5 writes ``rope_parameters``, transformers 4 ``rope_scaling`` (null for plain RoPE)."""
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def _rope_kind(rope: Mapping[str, Any]) -> str:
    return str(rope.get("rope_type") or rope.get("type") or "default")


def _rope_scaling(rope: Mapping[str, Any]) -> RopeScaling | None:
    kind = _rope_kind(rope)
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", float(rope["factor"]))
    return RopeScaling(
        kind,
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_position_embeddings=int(rope["original_max_position_embeddings"]),
    )


def _refusals(config: Mapping[str, Any]) -> Iterator[str]:
    """Everything in a configuration that our graphs do not compute, each in a few words."""
    names = config.get("architectures") or []
    if not names:
        yield "it names no architecture"
    elif names[0] not in _ARCHITECTURES:
        yield f"its architecture is {names[0]}"
    window = config.get("sliding_window")
    if window and window < config.get("max_position_embeddings", window + 1):
        yield f"it uses sliding-window attention ({window} tokens)"
    if config.get("hidden_act", "silu") != "silu":
        yield f"its activation is {config['hidden_act']}, not silu"
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            yield f"its linear layers have biases ({key})"
    if config.get("num_local_experts"):
        yield "it is a mixture of experts"
    yield from _rope_refusals(config)
    dtype = config.get("dtype") or config.get("torch_dtype") or "float16"
    if dtype not in ("float16", "bfloat16", "float32"):
        yield f"its dtype is {dtype}"


def _rope_refusals(config: Mapping[str, Any]) -> Iterator[str]:
    kind = _rope_kind(_rope(config))
    if kind not in ("default", *_ROPE_KINDS):
        yield f"its rotary scaling is {kind!r} (known: {', '.join(_ROPE_KINDS)})"
    if (_rope(config).get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0) != 1.0:
        yield "only a part of each head is rotated (partial_rotary_factor)"
