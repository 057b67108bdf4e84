"""Which TensorRT-LLM a machine has, asked of its own Python's package data: importing it would take long.

One small shell program says it, so that the same words work here and over ssh. It starts no builder.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from toolchain import runner
from toolchain.errors import ToolError

ASK = r"""
program=$(command -v trtllm-build) || program=
python=python3
if [ -n "$program" ]; then
  python=$(sed -n '1s/^#! *//p' "$program")
  case $python in */sh) python=$(sed -n "2s/^'''exec' \([^ ]*\) .*/\1/p" "$program" | tr -d '"') ;; esac
fi
echo "builder ${program:-none}"
$python -c 'import importlib.metadata as m; print("tensorrt_llm", m.version("tensorrt_llm"))' 2>/dev/null \
  || echo "tensorrt_llm none"
"""
"""The interpreter is the one in the first line of ``trtllm-build``, or in the second where pip found that too long
(pypa/distlib scripts.py, 2026); without a builder it is ``python3``, as in NVIDIA's images."""


def parse(text: str) -> tuple[str | None, str | None]:
    """What ``ASK`` printed -> (path of ``trtllm-build``, version of TensorRT-LLM), None for what is not there."""
    said = dict(line.split(" ", 1) for line in text.splitlines() if " " in line)
    builder, version = said.get("builder", "none"), said.get("tensorrt_llm", "none")
    return (None if builder == "none" else builder), (None if version == "none" else version)


def tensorrt_llm(environ: Mapping[str, str] = os.environ) -> tuple[str | None, str | None]:
    """The same of this machine, with the PATH of ``environ``."""
    try:
        return parse(runner.run(["sh", "-c", ASK], env=environ, timeout_s=30, check=False).stdout)
    except ToolError:
        return None, None


def is_release(version: str, release: str) -> bool:
    """Whether an installed version is that release: ``"0.17.0.post1"`` and ``"0.17.0+local"`` are ``"0.17.0"``."""
    public = version.partition("+")[0]
    return public == release or public.startswith(f"{release}.post")
