"""One step of scripts/bench_against_modelopt.py, in a process of its own: what it prints last is one line of JSON.

make SHAPE FOLDER            a random Llama in bfloat16 with outlier channels, and its token ids
ours RUN MODEL OUT           our quantize stage, from folder to committed folder
modelopt RUN MODEL OUT       NVIDIA ModelOpt: load, quantize, export_hf_checkpoint (its own environment; no toolchain)
pack-ours, pack-modelopt MODEL    FP8 codes and scales of every matrix of the decoder layers, from memory to memory
errors MODEL OUT             how far OUT's logits and the last layer's output are from MODEL's, in float32
"""

from __future__ import annotations

import copy
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SHAPES = {  # hidden, intermediate, layers, heads, kv heads, vocabulary
    "layer-13b": (5120, 13824, 1, 40, 40, 1024),
    "1b": (2048, 5632, 22, 32, 4, 32000),
    "tiny": (256, 768, 3, 4, 2, 512),
}
OURS = {
    "fp8": {"weights": "fp8", "scales": "modelopt"},
    "awq": {"weights": "int4", "method": "awq", "scales": "mse"},
    "awq-amax": {"weights": "int4", "method": "awq", "scales": "modelopt"},
}
"""`awq` as recipes have it, `awq-amax` with ModelOpt's group scales amax/7."""
OUTLIERS_EVERY, OUTLIER = 211, 10.0
SAMPLES, HELD_OUT = 2, 256
CONFIG = "config.json"


def make(shape: str, folder: Path, tokens: int) -> dict[str, Any]:
    """Weights as Llama initializes them; norms that make channels of different size, one in 211 ten times as large."""
    import torch
    from safetensors.torch import save_file

    from toolchain import family

    hidden, inner, layers, heads, kv_heads, vocabulary = SHAPES[shape]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, size in family.expected_tensors(family.read_config(config, shape)).items():
        values = torch.randn(size, generator=generator)
        if "layernorm" in name:
            values = values.mul_(0.5).exp_()
            values[::OUTLIERS_EVERY] *= OUTLIER
        elif "norm" in name:
            values.fill_(1.0)
        else:
            values.mul_(0.02)
        tensors[name] = values.to(torch.bfloat16)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2))
    ids = torch.randint(0, vocabulary, (SAMPLES, tokens // SAMPLES), generator=generator)
    held_out = torch.randint(0, vocabulary, (1, HELD_OUT), generator=generator)
    save_file({"ids": ids, "held_out": held_out}, folder.with_suffix(".ids"))
    return {"model_bytes": sum(tensor.nbytes for tensor in tensors.values())}


def ids_of(model: Path, which: str = "ids") -> Any:
    from safetensors.torch import load_file

    return load_file(model.with_suffix(".ids"))[which]


def ours(run: str, model: Path, out: Path) -> dict[str, Any]:
    start = time.monotonic()
    import numpy as np
    import torch

    from toolchain import workspace
    from toolchain.checkpoint import Checkpoint
    from toolchain.progress import Silent
    from toolchain.quantizers.samples import Samples
    from toolchain.stages.quantize import quantize

    imported = time.monotonic()
    samples = Samples(token_ids=ids_of(model).numpy().astype(np.int32), digest="bench", source="random rows")
    with workspace.draft(out, "bench", {"run": run}) as draft:
        checkpoint = Checkpoint.open(model)
        quantize(checkpoint, draft, group_size=128, kv="fp16", progress=Silent(), samples=samples, **OURS[run])
        draft.commit(versions={}, recipe="")
    seconds = {"import_s": imported - start, "work_s": time.monotonic() - imported}
    return {**seconds, "versions": {"torch": torch.__version__}, "torch_threads": torch.get_num_threads()}


def modelopt(run: str, model: Path, out: Path) -> dict[str, Any]:
    start = time.monotonic()
    import importlib.metadata

    import modelopt.torch.quantization as mtq
    import torch
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import LlamaForCausalLM

    imported = time.monotonic()
    ids = ids_of(model)
    llama = LlamaForCausalLM.from_pretrained(model, torch_dtype=torch.bfloat16).eval()
    loaded = time.monotonic()
    preset = mtq.FP8_DEFAULT_CFG if run == "fp8" else mtq.INT4_AWQ_CFG
    with torch.no_grad():
        llama = mtq.quantize(llama, copy.deepcopy(preset), lambda one: one(ids, use_cache=False))
    quantized = time.monotonic()
    with torch.inference_mode():
        export_hf_checkpoint(llama, dtype=torch.bfloat16, export_dir=out)
    end = time.monotonic()
    names = ("nvidia-modelopt", "torch", "transformers")
    return {
        "import_s": imported - start,
        "work_s": end - imported,
        "load_s": loaded - imported,
        "quantize_s": quantized - loaded,
        "export_s": end - quantized,
        "versions": {name: importlib.metadata.version(name) for name in names},
        "torch_threads": torch.get_num_threads(),
    }


def matrices(model: Path) -> list[Any]:
    """The decoder layers' matrices, read into memory."""
    from safetensors import safe_open

    with safe_open(model / "model.safetensors", "pt") as file:
        return [file.get_tensor(name).clone() for name in file.keys() if name.endswith("_proj.weight")]  # noqa: SIM118


def pack_ours(model: Path) -> dict[str, Any]:
    from toolchain.quantizers import fp8
    from toolchain.quantizers.rows import Workers

    weights = matrices(model)
    with Workers() as workers:
        start = time.monotonic()
        for weight in weights:
            fp8.cast(weight, fp8.scale_of([fp8.amax(weight, workers)]), workers)
        return {"pack_s": time.monotonic() - start}


def pack_modelopt(model: Path) -> dict[str, Any]:
    """What its exporter does: the scale from the amax, and the codes with ``to_quantized_weight``."""
    import torch
    from modelopt.torch.export.quant_utils import QUANTIZATION_FP8, to_quantized_weight
    from modelopt.torch.quantization.utils import reduce_amax

    weights = matrices(model)
    with torch.inference_mode():
        start = time.monotonic()
        for weight in weights:
            to_quantized_weight(weight, reduce_amax(weight).float() / 448, QUANTIZATION_FP8)
        return {"pack_s": time.monotonic() - start}


def errors(model: Path, out: Path) -> dict[str, Any]:
    """In float32, one decoder layer after the other, so that a whole model in float32 need not fit into memory.

    layer_error: what a layer adds to the hidden states of the unquantized model, root mean square over the layers.
    logit_error: of the quantized model by itself. Random models amplify every difference on the way, so this scatters.
    """
    from toolchain.checkpoint import Checkpoint
    from toolchain.quantizers import forward
    from toolchain.quantizers.source import Source

    exact, made = Source(Checkpoint.open(model)), Source(Checkpoint.open(out))
    config = exact.checkpoint.config

    def through(layer: int, source: Source, hidden: Any) -> Any:
        return forward.decoder_layer(hidden, layer_weights(source, layer), config, lambda _name, _x: None)

    def head(source: Source, hidden: Any) -> Any:
        scaled = hidden * (hidden.square().mean(-1, keepdim=True) + config.rms_norm_eps).rsqrt()
        return scaled * source.weight("model.norm.weight").float() @ source.weight("lm_head.weight").float().T

    hidden = forward.embed(exact.weight("model.embed_tokens.weight"), ids_of(model, "held_out")).float()
    alone, squares = hidden, []
    for layer in range(config.num_layers):
        right, wrong = through(layer, exact, hidden), through(layer, made, hidden)
        squares.append(float((wrong - right).square().sum() / (right - hidden).square().sum()))
        hidden, alone = right, wrong if layer == 0 else through(layer, made, alone)
    expected, found = head(exact, hidden), head(made, alone)
    logit_error = float((found - expected).norm() / expected.norm())
    return {"layer_error": math.sqrt(math.fsum(squares) / len(squares)), "logit_error": logit_error}


def layer_weights(source: Any, layer: int) -> dict[str, Any]:
    """By name within the layer, float32, as the stored tensors stand for them."""
    from toolchain import family
    from toolchain.quantizers.layer import restore

    prefix = f"model.layers.{layer}."
    weights = {f"{norm}.weight": source.weight(f"{prefix}{norm}.weight").float() for norm in family.NORMS}
    for linear in family.LINEARS:
        names = {one: f"{prefix}{linear}.{one}" for one in ("weight", "weight_scale", "pre_quant_scale")}
        stored = {one: source.weight(name) for one, name in names.items() if name in source.checkpoint.tensors}
        weights[f"{linear}.weight"] = restore(stored)
    return weights


def main(argv: list[str]) -> None:
    step, *rest = argv
    if step == "make":
        result = make(rest[0], Path(rest[1]), int(rest[2]))
    elif step in ("ours", "modelopt"):
        result = {"ours": ours, "modelopt": modelopt}[step](rest[0], Path(rest[1]), Path(rest[2]))
    elif step == "errors":
        result = errors(Path(rest[0]), Path(rest[1]))
    else:
        result = {"pack-ours": pack_ours, "pack-modelopt": pack_modelopt}[step](Path(rest[0]))
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
