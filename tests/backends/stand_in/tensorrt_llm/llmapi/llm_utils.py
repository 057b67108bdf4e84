"""How NVIDIA's own llmapi model and trtllm-serve turn a YAML's plain values into arguments of ``LLM``."""

from __future__ import annotations

from typing import Any

from tensorrt_llm import CudaGraphConfig, KvCacheConfig

_OBJECTS = {"kv_cache_config": KvCacheConfig, "cuda_graph_config": CudaGraphConfig}


def update_llm_args_with_extra_dict(llm_args: dict[str, Any], llm_args_dict: dict[str, Any]) -> dict[str, Any]:
    """The second over the first, nested dictionaries as the objects that they mean."""
    made = {name: _OBJECTS[name](**value) if name in _OBJECTS else value for name, value in llm_args_dict.items()}
    return llm_args | made
