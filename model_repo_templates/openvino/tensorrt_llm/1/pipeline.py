"""Opens OpenVINO GenAI's pipeline as the engine's passport says: cache, eviction, draft model or prompt lookup.

It knows no requests.
"""

from __future__ import annotations

import platform
import tempfile
from pathlib import Path
from typing import Any

import openvino as ov
import openvino_genai as genai
from openvino import opset13

_TOKENIZER = "openvino_tokenizer.xml"
KERNELS = 256
"""Entries of each kind in OpenVINO's cache of compiled kernels; the least recently used go. It compiles some for every
number of tokens in a step that it meets, and keeps 5000 where nothing is said, or none on ARM (rtCacheCapacity in
openvino/src/plugins/intel_cpu/src/config.h, read 2026-11-22). A small model that had met steps of 1 to 256 tokens held
240 MiB of them, and 90 MiB with 256 and without oneDNN's copies (see ``engine_client``); it was 2 % slower
meanwhile, and with 128 much slower (measured with 2026.4.1)."""


def open_pipeline(folder: Path, passport: dict[str, Any], scheduler: genai.SchedulerConfig) -> Any:
    """The pipeline of the engine in ``folder``; a draft model's engine lies beside it, in ``draft``.

    Raises RuntimeError, OpenVINO's own, for files that it cannot load.
    """
    runtime = passport["runtime"]
    device, properties = runtime.get("device", "CPU"), dict(runtime.get("properties", {}))
    if platform.machine() in ("x86_64", "AMD64"):
        properties.setdefault("CPU_RUNTIME_CACHE_CAPACITY", KERNELS)
    if "eviction" in runtime:
        scheduler.use_cache_eviction = True
        scheduler.cache_eviction_config = genai.CacheEvictionConfig(
            **runtime["eviction"], aggregation_mode=genai.AggregationMode.NORM_SUM, apply_rotation=False
        )
    if "lookup" in runtime:
        properties["prompt_lookup"] = True
    if "draft" not in runtime:
        return genai.ContinuousBatchingPipeline(str(folder), scheduler, device, properties)
    with tempfile.TemporaryDirectory(prefix="scalellm-") as work:
        paths = [_with_tokenizer(one, Path(work) / one.name) for one in (folder, folder.with_name("draft"))]
        draft = genai.draft_model(str(paths[1]), device, scheduler_config=scheduler, **properties)
        return genai.ContinuousBatchingPipeline(str(paths[0]), scheduler, device, {**properties, "draft_model": draft})


def _with_tokenizer(engine: Path, out: Path) -> Path:
    """Links to an engine's files, and a tokenizer where it has none.

    GenAI encodes one sentence with both tokenizers to see whether they agree, even though requests here are ids. The
    vocabularies were compared, id for id, when the repository was made; so it gets one that says 0 to everything.
    """
    out.mkdir()
    for file in engine.iterdir():
        (out / file.name).symlink_to(file.resolve())
    if not (out / _TOKENIZER).exists():
        ov.save_model(_zeros(), out / _TOKENIZER)
    return out


def _zeros() -> ov.Model:
    """texts [n] -> ids and mask i64 [n, 1], all 0."""
    texts = opset13.parameter(ov.PartialShape([-1]), ov.Type.string)
    shape = opset13.concat([opset13.shape_of(texts), opset13.constant([1], ov.Type.i64)], 0)
    results = []
    for name in ("input_ids", "attention_mask"):
        result = opset13.result(opset13.broadcast(opset13.constant(0, ov.Type.i64), shape))
        result.input(0).get_tensor().set_names({name})
        results.append(result)
    return ov.Model(results, [texts], "zeros")
