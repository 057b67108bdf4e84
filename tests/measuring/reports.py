"""Reports with times that are given, for what reads reports."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

from toolchain.measuring.report import (
    Conditions,
    Load,
    MemorySample,
    Predicted,
    Prediction,
    Report,
    Request,
    Run,
    Service,
    Watched,
)

OUTPUT = 11


def made_run(*, ttfts: Sequence[float], itl_s: float, failed: Sequence[str] = (), **conditions: Any) -> Run:
    """Requests one after the other, each of 512 tokens in and 11 out, dealt to the services in turn."""
    load = conditions.pop("load", Load(kind="closed", concurrency=1))
    output = conditions.pop("answered", OUTPUT)
    settled = {
        "prompt_set": "roleplay",
        "prompts_sha256": "00",
        "distinct_prompts": conditions.get("requests", len(ttfts)),
        "input_tokens": 512,
        "output_tokens": OUTPUT,
        "pattern": "simultaneous",
        "services": 1,
        "requests": len(ttfts),
        "warmup": 1,
        "streaming": True,
        "sampling": "greedy",
        "counted_by": "tokenizer 00",
    } | conditions
    made, at = [], 0.0
    for index, ttft_s in enumerate(ttfts):
        arrivals = tuple(at + ttft_s + step * itl_s for step in range(output))
        size = settled["input_tokens"] or 256 * (1 + index)
        made.append(_request(index % settled["services"], index, at, arrivals, arrivals[-1], output, None, size))
        at = arrivals[-1]
    for index, reason in enumerate(failed):
        made.append(_request(0, len(ttfts) + index, at, (), at, 0, reason))
    return Run(conditions=Conditions(load=load, **settled), wall_s=at, requests=tuple(made))


def _request(
    service: int,
    prompt: int,
    at: float,
    arrivals: tuple[float, ...],
    done: float,
    output: int,
    error: str | None,
    size: int = 512,
) -> Request:
    return Request(
        service=service,
        prompt=prompt,
        scheduled_s=at,
        sent_s=at,
        arrivals_s=arrivals,
        done_s=done,
        input_tokens=size,
        output_tokens=output,
        error=error,
    )


def made_report(*runs: Run, **changes: Any) -> Report:
    runs = runs or (made_run(ttfts=[0.1, 0.2], itl_s=0.01),)
    services = tuple(
        Service(door="triton-grpc", url=f"127.0.0.1:{8001 + 10 * number}", model="tensorrt_llm_bls", server={})
        for number in range(runs[0].conditions.services)
    )
    told: dict[str, Any] = {
        "title": "ours",
        "created": "2026-11-22T10:00:00+00:00",
        "simulated": False,
        "device": "rtx4090",
        "services": services,
        "runs": runs,
        "client": {"cores": 2},
    } | changes
    return Report(**told)


def made_reports() -> list[Report]:
    """Two reports as a person would lay side by side: three loads, two lengths, memory, a plan."""
    chance = random.Random(0)
    reports = []
    for name, slower in (("TensorRT-LLM on an RTX 4090", 1.0), ("another server", 1.6)):
        runs = []
        for length in (512, 2048):
            for many in (1, 4, 16):
                base = slower * length / 512 * 0.04 * many**0.7
                ttfts = [base * chance.lognormvariate(0, 0.15) for _ in range(30)]
                load = Load(kind="closed", concurrency=many)
                run = made_run(ttfts=ttfts, itl_s=0.012 * slower * many**0.3, load=load, input_tokens=length)
                run = run.model_copy(update={"wall_s": run.wall_s / many})
                runs.append(run.model_copy(update={"memory": tuple(_memory(run.wall_s, slower))}))
        told = {
            "title": name,
            "watched": WATCHED,
            "engine": {"limits": {"max_seq_len": 4096}},
        }
        reports.append(made_report(*runs, **told, predicted=PREDICTED if slower == 1 else None))
    return reports


WATCHED = Watched(processes=("tritonserver",), gpus=("NVIDIA GeForce RTX 4090",), every_s=0.5)
PREDICTED = Prediction(
    ttft=tuple(
        Predicted(tokens=tokens, batch=1, seconds=tokens / 512 * 0.035, floor_s=tokens / 512 * 0.021)
        for tokens in (512, 1024, 2048, 4096)
    ),
    itl=(Predicted(tokens=2048, batch=1, seconds=0.011, floor_s=0.008),),
    ttft_factor=1.3,
    itl_factor=1.2,
)


def _memory(wall_s: float, size: float) -> Iterator[MemorySample]:
    for step in range(int(wall_s / 0.5) + 1):
        grown = int((2.0 + 0.5 * size + 0.2 * (step % 7) / 7) * 2**30)
        yield MemorySample(at_s=step * 0.5, rss_bytes=grown, gpu_bytes=(grown * 8,))
