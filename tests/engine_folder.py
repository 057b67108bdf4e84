"""An engine folder as ``trtllm-build`` and ``scalellm build`` leave it, without a GPU: only the ranks are empty."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from toolchain import workspace
from toolchain.engine import Engine, Limits, Passport, write_passport
from toolchain.release import releases

LIMITS = Limits(max_batch_size=8, max_seq_len=256, max_input_len=200, max_num_tokens=1024)


def config_json(release: str, limits: Limits = LIMITS, *, tp: int = 1, pp: int = 1, vocab: int = 384) -> dict[str, Any]:
    """The keys that the runtime reads, as TensorRT-LLM tensorrt_llm/builder.py EngineConfig.to_dict writes them."""
    return {
        "version": release,
        "pretrained_config": {
            "producer": {"name": "scalellm", "version": "0"},
            "architecture": "LlamaForCausalLM",
            "dtype": "float16",
            "logits_dtype": "float32",
            "vocab_size": vocab,
            "max_position_embeddings": 4096,
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "mapping": {"world_size": tp * pp, "gpus_per_node": 8, "cp_size": 1, "tp_size": tp, "pp_size": pp},
            "quantization": {"quant_algo": "W4A16_AWQ", "kv_cache_quant_algo": None, "group_size": 128},
        },
        "build_config": {
            "max_input_len": limits.max_input_len,
            "max_seq_len": limits.max_seq_len,
            "opt_batch_size": 8,
            "max_batch_size": limits.max_batch_size,
            "max_beam_width": 1,
            "max_num_tokens": limits.max_num_tokens,
            "gather_context_logits": False,
            "gather_generation_logits": False,
            "strongly_typed": True,
            "speculative_decoding_mode": 1,
            "max_draft_len": 0,
            "plugin_config": {
                "dtype": "float16",
                "gpt_attention_plugin": "float16",
                "paged_kv_cache": True,
                "tokens_per_block": 64,
                "use_paged_context_fmha": True,
            },
        },
    }


def write_engine(
    target: Path,
    release: str,
    *,
    tokenizer: Path | None = None,
    tp: int = 1,
    pp: int = 1,
    config: dict[str, Any] | None = None,
    runtime: dict[str, Any] | None = None,
    named: bool = True,
    **passport: Any,
) -> Engine:
    """A finished engine folder. ``tokenizer`` is a folder to take one from; ``passport`` replaces its
    fields; ``named``: it says which release."""
    row = releases()[release]
    config = config or config_json(release, tp=tp, pp=pp)
    with workspace.draft(target, "engine", {"release": release}) as draft:
        (draft.path / "config.json").write_text(json.dumps(config))
        for rank in range(tp * pp):
            (draft.path / f"rank{rank}.engine").write_bytes(bytes(64) + bytes([rank]))
        if tokenizer is None:
            (draft.path / "tokenizer.json").write_text("{}")
        else:
            for file in tokenizer.glob("*token*"):
                shutil.copyfile(file, draft.path / file.name)
        fields: dict[str, Any] = {
            "backend": "tensorrt_engine",
            "recipe": "parrot",
            "architecture": "LlamaForCausalLM",
            "vocab_size": 384,
            "num_layers": 2,
            "bos_token_id": 0,
            "eos_token_ids": (1,),
            "weights": "int4",
            "group_size": 128,
            "kv": "fp16",
            "limits": LIMITS,
            "device": "rtx4090",
            "sm": 89,
            "runtime": runtime
            or {"max_tokens_in_paged_kv_cache": 2048, "enable_kv_cache_reuse": True, "enable_chunked_context": True},
            "versions": {},
            "checkpoint": "",
            "release": release if named else None,
            "tensorrt": row.tensorrt,
            "container": row.container,
            "tp": tp,
            "pp": pp,
        }
        write_passport(draft.path, Passport(**{**fields, **passport}))
        draft.commit(versions={}, recipe="")
    return Engine.open(target)


DRAFTED = 4
"""Tokens that the engine of ``write_pair`` is built to check in one step."""


def write_pair(folder: Path, release: str, tokenizer: Path | None = None) -> tuple[Engine, Engine]:
    """An engine that is built for a draft model, and the draft's own, which knows fewer positions."""
    config = config_json(release, replace(LIMITS, max_seq_len=LIMITS.max_seq_len + DRAFTED))
    config["build_config"]["max_draft_len"] = DRAFTED
    cache = {"max_tokens_in_paged_kv_cache": 2048, "enable_kv_cache_reuse": True, "enable_chunked_context": True}
    runtime = {**cache, "draft": {"tokens": DRAFTED}}
    engine = write_engine(folder / "engine", release, tokenizer=tokenizer, config=config, runtime=runtime)
    shorter = replace(LIMITS, max_seq_len=96, max_input_len=96)
    config = config_json(release, shorter)
    draft = write_engine(folder / "draft", release, tokenizer=tokenizer, config=config, runtime=cache, limits=shorter)
    return engine, draft
