"""Promises about what a worker says of itself."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from toolchain.fleet.worker.bulletin import Bulletin, of_engine
from toolchain.fleet.worker.worker import Adapter, make_triton
from toolchain.gateway.settings import Timeouts
from toolchain.gateway.triton import make_session

METRICS = """\
# HELP nv_inference_request_success Number of successful inference requests, all batch sizes
# TYPE nv_inference_request_success counter
nv_inference_request_success{model="tensorrt_llm",version="1"} 7
nv_inference_request_success{model="preprocessing",version="1"} 9
# HELP nv_inference_request_duration_us Cumulative inference request duration in microseconds
# TYPE nv_inference_request_duration_us counter
nv_inference_request_duration_us{model="tensorrt_llm",version="1"} 12345
# HELP nv_cpu_utilization CPU utilization rate [0.0 - 1.0]
# TYPE nv_cpu_utilization gauge
nv_cpu_utilization 0.5
# HELP nv_gpu_utilization GPU utilization rate [0.0 - 1.0)
# TYPE nv_gpu_utilization gauge
nv_gpu_utilization{gpu_uuid="GPU-1"} 0.9
# HELP nv_trt_llm_kv_cache_block_metrics TRT LLM KV cache block metrics
# TYPE nv_trt_llm_kv_cache_block_metrics gauge
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="used",model="tensorrt_llm",version="1"} 3
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="max",model="tensorrt_llm",version="1"} 10
"""


def test_of_a_tritons_metrics_the_engines_own_are_passed_on() -> None:
    others = ("nv_cpu", "duration", "preprocessing")
    lines = [line for line in METRICS.splitlines() if not any(word in line for word in others)]
    assert of_engine(METRICS).splitlines() == lines
    assert of_engine("") == ""
    assert of_engine('nv_gpu_x{a="b"} 1\n' * 10_000) == ""


def test_the_file_has_state_and_figures(tmp_path: Path) -> None:
    status, file = tmp_path / "status.json", tmp_path / "worker.json"
    status.write_text(json.dumps({"kv_usage_percent": 25.0, "kv_blocks": 40, "drafted": 8, "accepted": 5}))

    async def play() -> None:
        async with make_session(Timeouts()) as session:
            triton = make_triton("http://127.0.0.1:9", session, Timeouts(), status_file=str(status))
            adapter = Adapter(triton, replica="one")
            adapter.tokens, adapter.requests = 12, 3
            bulletin = Bulletin(str(file), adapter)
            bulletin.tell("ready")
            telling = asyncio.create_task(bulletin.keep())
            await asyncio.sleep(0.05)
            telling.cancel()

    asyncio.run(play())
    found = json.loads(file.read_text())
    assert (found["state"], found["why"]) == ("ready", "")
    assert found["figures"] == {
        "running": 0,
        "requests": 3,
        "tokens": 12,
        "kv_blocks": {"used": 10, "total": 40},
        "drafts": {"drafted": 8, "accepted": 5},
        "metrics": "",
    }
