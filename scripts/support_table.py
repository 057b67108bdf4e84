"""Which TensorRT-LLM release runs which quantization on which GPU, as scalellm plans it: writes SUPPORT.md.

    python scripts/support_table.py          # writes SUPPORT.md
    python scripts/support_table.py --check  # exit code 1 where SUPPORT.md is not what the facts give

Every cell is a plan of a two-layer Llama, so that memory refuses nothing, with the release pinned. Nothing was run.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

from toolchain.device import Device, devices
from toolchain.errors import PlanError, RecipeError
from toolchain.family import LlamaConfig, published
from toolchain.planning.plan import Plan, make_plan
from toolchain.recipe import parse_recipe
from toolchain.release import releases

PAGE = Path(__file__).resolve().parent.parent / "SUPPORT.md"
MODEL = "meta-llama/Llama-2-13b-chat-hf"
FORMATS = (
    *(("none", "fp16"), ("int8", "fp16"), ("int8", "int8")),
    *(("int4", "fp16"), ("int4", "int8"), ("int4", "fp8")),
    *(("int8_sq", "fp16"), ("int8_sq", "int8")),
    *(("fp8", "fp16"), ("fp8", "fp8"), ("int4_fp8", "fp8")),
)
"""(weights, cache) as recipes name them."""

HEAD = """\
# Which release runs what

Made by `python scripts/support_table.py` from the tables in `toolchain/facts/`, which hold the source of each entry. A
test keeps this page equal to what `scalellm plan` decides. **None of it was run on a GPU by us**: it is what NVIDIA's
support matrices, release notes, source text and issues say.

- Weights and cache are named as in a recipe; `int4` is W4A16 with groups of 128 (AWQ, GPTQ or plain rounding),
  `int8_sq` SmoothQuant, `int4_fp8` W4A8.
- **engine**: `trtllm-build` and Triton's C++ backend. It ends with 1.2.1: TensorRT-LLM 1.3 and later have no engine
  path, and `backend: tensorrt_llmapi` goes on. **llmapi**: TensorRT-LLM's PyTorch runtime behind Triton.
- **reuse**: whether an engine of the newest release can reuse cached prompts and cut long prompts into pieces.
- A plan picks the newest release of the row, unless the recipe pins one (`tensorrt_llm: "0.21.0"`).
"""


@dataclass(frozen=True)
class Row:
    """One pair of formats on one SM."""

    weights: str
    kv: str
    engine: str
    llmapi: str
    reuse: str
    remarks: tuple[str, ...]

    def line(self) -> str:
        remarks = " ".join(self.remarks).replace("|", "\\|")
        return f"| {self.weights} | {self.kv} | {self.engine} | {self.llmapi} | {self.reuse} | {remarks} |"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; say whether the page is current")
    asked = parser.parse_args(argv)
    text = page()
    if asked.check:
        return 0 if PAGE.read_text(encoding="utf-8") == text else 1
    PAGE.write_text(text, encoding="utf-8")
    return 0


def page() -> str:
    """The text of SUPPORT.md."""
    return HEAD + "".join(_section(list(group)) for group in _by_sm()) + _releases()


def _by_sm() -> Iterator[Iterable[Device]]:
    gpus = sorted((one for one in devices().values() if one.sm is not None), key=lambda one: one.sm or 0)
    return (group for _, group in groupby(gpus, key=lambda one: (one.sm, one.backends)))


def _section(gpus: Sequence[Device]) -> str:
    first = gpus[0]
    sm = first.sm or 0
    lines = [f"\n## SM {sm // 10}.{sm % 10}: {', '.join(gpu.title for gpu in gpus)}\n"]
    if "tensorrt_llmapi" not in first.backends:
        lines.append(f"The llmapi runtime does not run here. {first.notes}\n")
    lines.append("| weights | cache | engine | llmapi | reuse | remarks |")
    lines.append("|---|---|---|---|---|---|")
    lines += [row(first, weights, kv).line() for weights, kv in FORMATS]
    return "\n".join(lines) + "\n"


def row(gpu: Device, weights: str, kv: str) -> Row:
    """What both backends' releases say to a pair of formats."""
    remarks: dict[str, None] = {}
    ranges, reuse = {}, "-"
    for backend in ("tensorrt_engine", "tensorrt_llmapi"):
        plans = list(_plans(gpu, weights, kv, backend, remarks))
        ranges[backend] = spans([plan.release.version for plan in plans if plan.release], backend)
        if backend == "tensorrt_engine" and plans:
            reuse = "yes" if plans[-1].paged_context_fmha else "no"
    return Row(weights, kv, ranges["tensorrt_engine"], ranges["tensorrt_llmapi"], reuse, tuple(remarks))


def _plans(gpu: Device, weights: str, kv: str, backend: str, remarks: dict[str, None]) -> Iterator[Plan]:
    """The plans of every release that makes one; why none does goes to ``remarks``."""
    refusal, made = "", False
    for release in releases().values():
        if not release.has(backend):
            continue
        try:
            yield planned(gpu, weights, kv, backend, release.version)
            made = True
        except (PlanError, RecipeError) as error:
            refusal = _short(error.message)
    if refusal and not made and backend in gpu.backends:
        remarks[f"{refusal.rstrip('.')}."] = None


def planned(gpu: Device, weights: str, kv: str, backend: str, version: str) -> Plan:
    """The plan of a small Llama. Raises PlanError with the reasons where there is none."""
    text = (
        f'model: {MODEL}\ndevice: {gpu.name}\nbackend: {backend}\ntensorrt_llm: "{version}"\n'
        f"quantization: {{weights: {weights}}}\nkv_cache: {{dtype: {kv}}}\n"
        "limits: {max_batch_size: 1, max_seq_len: 1024, max_input_len: 512, max_num_tokens: 512}\n"
    )
    return make_plan(parse_recipe(text, Path("support.yaml")), _small())


def _small() -> LlamaConfig:
    known = published(MODEL)
    assert known is not None
    return replace(known, num_layers=2)


def _short(message: str) -> str:
    """The first reason of a refusal, without the recipe's name and the source."""
    reasons = [line.strip(" -") for line in message.splitlines() if line.startswith("  - ")] or [message]
    plain = re.sub(r"^(support: )?(this recipe cannot run: )?", "", re.sub(r"\s+", " ", reasons[0]))
    return re.sub(r" \(https?://.*\)$", "", plain)


def spans(versions: Sequence[str], backend: str) -> str:
    """``["0.12.0", "0.13.0"]`` -> ``"0.12.0 - 0.13.0"``; gaps in the table of releases divide it; ``"no"`` for none."""
    known = [release.version for release in releases().values() if release.has(backend)]
    runs: list[list[str]] = []
    for place, version in enumerate(known):
        if version in versions:
            if runs and known[place - 1] == runs[-1][-1]:
                runs[-1].append(version)
            else:
                runs.append([version])
    return ", ".join(run[0] if len(run) == 1 else f"{run[0]} - {run[-1]}" for run in runs) or "no"


def _releases() -> str:
    lines = ["\n## Releases\n", "| TensorRT-LLM | Triton image | TensorRT | CUDA | Python | driver | engine | llmapi |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for one in releases().values():
        driver = one.driver + ("*" if "driver" in one.unconfirmed else "")
        flags = " | ".join("yes" if has else "no" for has in (one.engine, one.llmapi))
        tags = ", ".join(one.triton)
        lines.append(f"| {one.version} | {tags} | {one.tensorrt} | {one.cuda} | {one.python} | {driver} | {flags} |")
    lines.append("\n\\* taken over from a neighbor with the same CUDA, not confirmed to the last digit.\n")
    lines.append(
        "What goes wrong with a release stands in `facts/releases.yaml` (`traps`); `scalellm commands` prints it."
    )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
