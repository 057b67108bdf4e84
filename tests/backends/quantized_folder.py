"""Small random Llamas, Mistrals and Qwen2s and their quantized folders, made without any code of ours.

The quantizer here is a few lines of numpy that follow the layout's description (ModelOpt's unified Hugging Face export)
and nothing else, so that the engine is checked against an independent reading of it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
QUANT_ALGO = {
    "fp8": "FP8",
    "int4": "W4A16_AWQ",
    "int8": "W8A16",
    "int8_sq": "W8A8_SQ_PER_CHANNEL",
    "int4_fp8": "W4A8_AWQ",
}
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class QuantizedFolder:
    """A folder on disk and the float32 model that it stands for."""

    path: Path
    reference: transformers.PreTrainedModel
    tensors: dict[str, torch.Tensor]


def random_llama(
    *,
    heads: int = 4,
    kv_heads: int = 4,
    tied: bool = False,
    rope: dict[str, object] | None = None,
    seed: int = 1,
    architecture: str = "LlamaForCausalLM",
    vocabulary: int = 512,
    **more: object,
) -> transformers.PreTrainedModel:
    """Two layers, hidden 256, float32; weights and biases large enough that logits differ clearly."""
    torch.manual_seed(seed)
    kind = getattr(transformers, architecture)
    config = kind.config_class(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        rope_parameters=rope or {"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.08,
        **more,
    )
    model = kind(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
            elif name.endswith(".bias"):
                parameter.copy_(torch.randn_like(parameter))
    return model


def write_quantized(
    model: transformers.PreTrainedModel,
    path: Path,
    weights: str,
    *,
    group: int = 128,
    dtype: str = "float16",
    pre_quant: bool = False,
) -> QuantizedFolder:
    """``weights``: a key of ``QUANT_ALGO``, or "none". The reference gets the dequantized weights in float32.

    ``pre_quant``: o_proj and down_proj get a ``pre_quant_scale``; with int8_sq every linear layer has one.
    """
    path.mkdir(parents=True)
    tensors: dict[str, torch.Tensor] = {}
    stands_for: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        module = name.removesuffix(".weight")
        if weights != "none" and module.endswith(LINEARS):
            stored, meaning = _quantize(tensor.numpy(), weights, group)
            if weights == "int8_sq" or (pre_quant and module.endswith(("o_proj", "down_proj"))):
                factor = (0.5 + torch.rand(tensor.shape[1])).to(DTYPES[dtype])
                stored["pre_quant_scale"] = factor
                meaning = meaning * factor.float().numpy()
            tensors |= {f"{module}.{key}": value for key, value in stored.items()}
            stands_for[name] = torch.from_numpy(np.ascontiguousarray(meaning))
        else:
            tensors[name] = tensor.to(DTYPES[dtype])
            stands_for[name] = tensors[name].float()
    save_file({key: value.contiguous() for key, value in tensors.items()}, path / "model.safetensors", {"format": "pt"})
    raw = model.config.to_dict() | {"dtype": dtype, "architectures": [type(model).__name__]}
    (path / "config.json").write_text(json.dumps(raw))
    (path / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    if weights != "none":
        scheme = {"quant_algo": QUANT_ALGO[weights], "kv_cache_quant_algo": None}
        if weights in ("int4", "int4_fp8"):
            scheme |= {"group_size": group, "has_zero_point": False, "pre_quant_scale": pre_quant}
        (path / "hf_quant_config.json").write_text(json.dumps({"quantization": scheme}))
    reference = type(model)(model.config).eval()
    reference.load_state_dict(stands_for, strict=False)
    reference.tie_weights()
    return QuantizedFolder(path, reference, tensors)


def _quantize(matrix: np.ndarray, weights: str, group: int) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """[out, in] float32 -> the tensors of the layout, and the float32 matrix that they mean."""
    if weights == "fp8":
        scale = torch.tensor(float(np.abs(matrix).max()) / 448.0, dtype=torch.float32)
        codes = (torch.from_numpy(matrix) / scale).to(torch.float8_e4m3fn)
        return {"weight": codes, "weight_scale": scale}, (codes.float() * scale).numpy()
    if weights in ("int8", "int8_sq"):
        largest = (np.abs(matrix).max(axis=1) / 127.0).astype(np.float32)
        whole = np.rint(matrix / largest[:, None]).astype(np.int8)
        stored = {"weight": torch.from_numpy(whole), "weight_scale": torch.from_numpy(largest)}
        if weights == "int8_sq":
            stored["input_scale"] = torch.tensor(0.02)
        return stored, whole * largest[:, None]
    rows, columns = matrix.shape
    grouped = matrix.reshape(rows, columns // group, group)
    scales = (np.abs(grouped).max(axis=2) / 7.0).astype(np.float32)
    codes_int = np.clip(np.rint(grouped / scales[:, :, None]), -8, 7).astype(np.int8)
    meaning = (codes_int * scales[:, :, None]).reshape(rows, columns).astype(np.float32)
    nibbles = (codes_int.reshape(rows, columns) & 15).astype(np.uint8)
    packed = nibbles[0::2] | (nibbles[1::2] << 4)
    stored = {"weight": torch.from_numpy(packed), "weight_scale": torch.from_numpy(scales)}
    if weights == "int4_fp8":
        stored |= {"weight_scale_2": torch.tensor(float(scales.max()) / 64), "input_scale": torch.tensor(0.02)}
    return stored, meaning
