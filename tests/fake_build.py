"""A ``trtllm-build`` that builds nothing: it leaves what the real one leaves, of which only the numbers mean something.

``config.json`` has the keys ``version``, ``pretrained_config`` and ``build_config`` with a nested ``plugin_config``
(TensorRT-LLM tensorrt_llm/builder.py, EngineConfig.to_dict). For tests only.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_WORDS = {"enable": True, "disable": False}
_PLUGINS = (
    "plugin",
    "fmha",
    "remove_input_padding",
    "tokens_per_block",
    "use_fused_mlp",
    "paged_kv_cache",
    "streaming",
)


def flags_of(argv: Sequence[str]) -> dict[str, Any]:
    """``--name value`` and ``--switch`` -> name -> int, bool or text."""
    found: dict[str, Any] = {}
    for place, word in enumerate(argv):
        if word.startswith("--"):
            value = argv[place + 1] if place + 1 < len(argv) and not argv[place + 1].startswith("--") else "enable"
            found[word[2:]] = int(value) if value.isdigit() else _WORDS.get(value, value)
    return found


def engine_config(argv: Sequence[str], checkpoint: dict[str, Any], version: str) -> dict[str, Any]:
    """The engine's ``config.json``. The tokens of a draft are added to ``max_seq_len``, as the builder does."""
    flags = flags_of(argv)
    for gone in ("checkpoint_dir", "output_dir", "workers"):
        flags.pop(gone, None)
    plugins = {name: flags.pop(name) for name in list(flags) if any(part in name for part in _PLUGINS)}
    flags["max_seq_len"] += flags.get("max_draft_len", 0)
    return {"version": version, "pretrained_config": checkpoint, "build_config": {**flags, "plugin_config": plugins}}


def main(argv: Sequence[str], version: str, record: str) -> None:
    """One run; ``record`` gets its argv as a line of JSON."""
    with Path(record).open("a") as lines:
        lines.write(json.dumps({"argv": list(argv)}) + "\n")
    flags = flags_of(argv)
    checkpoint, out = Path(flags["checkpoint_dir"]), Path(flags["output_dir"])
    config = json.loads((checkpoint / "config.json").read_text())
    print(f"[TensorRT-LLM] TensorRT-LLM version: {version}", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    for rank in range(config["mapping"]["world_size"]):
        assert (checkpoint / f"rank{rank}.safetensors").is_file()
        (out / f"rank{rank}.engine").write_bytes(b"engine of rank %d" % rank)
    (out / "config.json").write_text(json.dumps(engine_config(argv, config, version), indent=4))
