"""Reports with times that are given, for what reads reports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from toolchain.measuring.report import Conditions, Load, Report, Request, Run, Service

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
        made.append(_request(index % settled["services"], index, at, arrivals, arrivals[-1], output, None))
        at = arrivals[-1]
    for index, reason in enumerate(failed):
        made.append(_request(0, len(ttfts) + index, at, (), at, 0, reason))
    return Run(conditions=Conditions(load=load, **settled), wall_s=at, requests=tuple(made))


def _request(
    service: int, prompt: int, at: float, arrivals: tuple[float, ...], done: float, output: int, error: str | None
) -> Request:
    return Request(
        service=service,
        prompt=prompt,
        scheduled_s=at,
        sent_s=at,
        arrivals_s=arrivals,
        done_s=done,
        input_tokens=512,
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
