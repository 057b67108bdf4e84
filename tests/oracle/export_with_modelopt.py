"""Let NVIDIA ModelOpt quantize and export tiny Llamas: what the tests beside this file compare ours with.

    .venv-oracle/bin/python tests/oracle/export_with_modelopt.py .oracle

Runs in the environment of the extra `oracle` and imports nothing of ours. Each model gets a folder:

    hf/            the model (transformers), activations with outlier channels
    ids.safetensors   the rows of token ids that ModelOpt calibrated on
    WAY/           the unified Hugging Face export of each of WAYS
    WAY-trt/       the TensorRT-LLM export, where one is compared; WAY-trt-2-1/ for two ranks, WAY-trt-1-3/ for stages
    WAY.ranges.safetensors    of K and V, for an INT8 cache
    WAY.safetensors   for AWQ: the channel scale of each linear that the search chose, and its alpha

``stamp.json`` is written last; it names this file's sha256 and the versions.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.metadata
import io
import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint, export_tensorrt_llm_checkpoint
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "mha-fp16": (torch.float16, {"num_key_value_heads": 4}),
    "gqa-llama3-bf16": (
        torch.bfloat16,
        {"num_key_value_heads": 2, "rope_theta": 500000.0, "rope_scaling": LLAMA3},
    ),
    "tied-gqa-bf16": (torch.bfloat16, {"num_key_value_heads": 2, "tie_word_embeddings": True}),
}
KV_FP8 = [{"quantizer_name": "*[kv]_bmm_quantizer", "cfg": {"num_bits": (4, 3)}, "enable": True}]
KV_INT8 = [{"quantizer_name": "*[kv]_bmm_quantizer", "cfg": {"num_bits": 8}, "enable": True}]
AWQ = {"method": "awq_lite", "alpha_step": 0.1, "debug": True}
WAYS: dict[str, tuple[dict[str, Any], list[Any], dict[str, Any] | None]] = {
    "fp8": (mtq.FP8_DEFAULT_CFG, KV_FP8, None),
    "int8-wo": (mtq.INT8_WEIGHT_ONLY_CFG, [], None),
    "int8-wo-kv8": (mtq.INT8_WEIGHT_ONLY_CFG, KV_INT8, None),
    "int4": (mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG, [], None),
    "awq": (mtq.INT4_AWQ_CFG, [], AWQ),
    "awq-kv8": (mtq.INT4_AWQ_CFG, KV_INT8, AWQ),
    "w4a8": (mtq.W4A8_AWQ_BETA_CFG, [], AWQ),
    "int8-sq": (mtq.INT8_SMOOTHQUANT_CFG, [], {"method": "smoothquant", "alpha": 0.5}),
}
UNIFIED = ("fp8", "int8-wo", "int4", "awq", "awq-kv8", "w4a8", "int8-sq")
"""An INT8 cache has no place in the unified layout: "awq-kv8" is exported there without it."""
TENSORRT_LLM: dict[str, tuple[tuple[int, int], ...]] = {
    "fp8": ((1, 1), (2, 1), (1, 3)),
    "awq-kv8": ((1, 1), (2, 1)),
    "int8-wo-kv8": ((1, 1),),
    "int8-sq": ((1, 1),),
}
"""Way -> tensor parallel x pipeline parallel. ModelOpt splits on a CPU, too."""


def main() -> None:
    target = Path(sys.argv[1])
    torch.set_num_threads(1)  # the same bits as with two, for a quarter of the CPU time: the matrices are small
    shutil.rmtree(target, ignore_errors=True)
    for name in MODELS:
        make(name, target / name)
    versions = {
        package: importlib.metadata.version(package) for package in ("nvidia-modelopt", "torch", "transformers")
    }
    stamp = {"script": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(), "versions": versions}
    (target / "stamp.json").write_text(json.dumps(stamp, indent=2))


def make(name: str, folder: Path) -> None:
    dtype, _ = MODELS[name]
    random_model(name).save_pretrained(folder / "hf")
    model = LlamaForCausalLM.from_pretrained(folder / "hf", torch_dtype=dtype).eval()
    ids = torch.randint(0, model.config.vocab_size, (8, 64), generator=torch.Generator().manual_seed(1))
    save_file({"ids": ids}, folder / "ids.safetensors")
    for way in WAYS:
        print(f"{name}: {way}", flush=True)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            export(copy.deepcopy(model), way, ids, folder)


def random_model(name: str) -> Any:
    """Three layers, hidden 256. The norms give channels of very different size, some of them outliers."""
    dtype, differences = MODELS[name]
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=512,
        max_position_embeddings=512,
        **differences,
    )
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "layernorm" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator).mul(0.7).exp())
                parameter[::37] *= 10
            elif "norm" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator).mul(0.3).exp())
            elif "proj" in key:
                parameter.mul_(2)
    model.config.torch_dtype = dtype
    return model.to(dtype)


def export(model: Any, way: str, ids: torch.Tensor, folder: Path) -> None:
    preset, kv, algorithm = WAYS[way]
    config = copy.deepcopy(preset)
    config["quant_cfg"] = [*config["quant_cfg"], *kv]
    if algorithm:
        config["algorithm"] = dict(algorithm)
    quantized = mtq.quantize(model, config, lambda one: one(ids, use_cache=False))
    dtype = next(model.parameters()).dtype
    if algorithm == AWQ:
        save_file(searched(quantized), folder / f"{way}.safetensors")
    with torch.inference_mode():
        for tp, pp in TENSORRT_LLM.get(way, ()):
            target = folder / (f"{way}-trt" if tp == pp == 1 else f"{way}-trt-{tp}-{pp}")
            export_tensorrt_llm_checkpoint(copy.deepcopy(quantized), "llama", dtype, target, tp, pp)
        if kv is KV_INT8:
            save_file(taken_ranges(quantized), folder / f"{way}.ranges.safetensors")
        if way in UNIFIED:
            export_hf_checkpoint(quantized, dtype=dtype, export_dir=folder / way)


def taken_ranges(model: Any) -> dict[str, torch.Tensor]:
    """The ranges of K and V of each layer, "0.k" and so on; the model has no INT8 cache any more."""
    found = {}
    for layer, block in enumerate(model.model.layers):
        for one in "kv":
            quantizer = getattr(block.self_attn, f"{one}_bmm_quantizer")
            found[f"{layer}.{one}"] = quantizer.amax.float().clone()
            quantizer.reset_amax()
            quantizer.disable()
    return found


def searched(model: Any) -> dict[str, torch.Tensor]:
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "awq_lite") and module.awq_lite.best_scale is not None:
            found[f"{name}.scale"] = module.awq_lite.best_scale.float().contiguous()
            found[f"{name}.alpha"] = torch.tensor(module.awq_lite.best_alpha)
            del module.awq_lite  # it holds the module, and would be exported with it
    return found


if __name__ == "__main__":
    main()
