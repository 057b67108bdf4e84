"""A machine with a GPU and a ``trtllm-build`` whose engines can be packaged. For tests only.

The builder leaves what the real one leaves (``config.json`` with ``version``,
``pretrained_config`` and ``build_config``; a file for each rank), of which only the numbers mean something.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.hosts.fakes import Programs

_BUILDER = """\
#!{python}
import json, os, sys
from pathlib import Path

argv = sys.argv[1:]
with open({record!r}, "a") as record:
    record.write(json.dumps({{"argv": argv, "cuda": os.environ.get("CUDA_VISIBLE_DEVICES")}}) + "\\n")
flags = {{}}
for place, word in enumerate(argv):
    if word.startswith("--"):
        value = argv[place + 1] if place + 1 < len(argv) and not argv[place + 1].startswith("--") else True
        flags[word[2:]] = int(value) if isinstance(value, str) and value.isdigit() else value
checkpoint, out = Path(flags.pop("checkpoint_dir")), Path(flags.pop("output_dir"))
flags.pop("workers", None)
config = json.loads((checkpoint / "config.json").read_text())
plugins = ("plugin", "fmha", "remove_input_padding", "tokens_per_block", "use_fused_mlp", "paged_kv_cache")
plugin_config = {{name: flags.pop(name) for name in list(flags) if any(part in name for part in plugins)}}
print("[TensorRT-LLM] TensorRT-LLM version: {version}", flush=True)
out.mkdir(parents=True, exist_ok=True)
for rank in range(config["mapping"]["world_size"]):
    assert (checkpoint / f"rank{{rank}}.safetensors").is_file()
    (out / f"rank{{rank}}.engine").write_bytes(b"engine of rank %d" % rank)
document = {{
    "version": {version!r},
    "pretrained_config": config,
    "build_config": {{**flags, "plugin_config": plugin_config}},
}}
(out / "config.json").write_text(json.dumps(document, indent=4))
"""


def gpu_machine(folder: Path, gpu: str, version: str) -> Programs:
    """The fake programs of a machine with the GPU line ``gpu`` (see ``fakes``), with that builder among them.

    ``trtllm-build.jsonl`` in ``folder`` gets a line of JSON for each of its runs.
    """
    programs = Programs(folder, "nvidia-smi", "trtllm-build", version=version, gpus=(gpu,))
    record = str(folder / "trtllm-build.jsonl")
    text = _BUILDER.format(python=sys.executable, record=record, version=version)
    (folder / "trtllm-build").write_text(text)
    return programs
