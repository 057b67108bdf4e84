"""What quantizing a plan's model takes at its peak, before anybody has opened the model. Imports no torch."""

from __future__ import annotations

from toolchain.planning.build_peaks import Peak
from toolchain.planning.plan import Plan
from toolchain.quantizers.budget import Need, Work, least_need
from toolchain.quantizers.layout import Scheme
from toolchain.quantizers.place import usable_cores

_SOURCE = "toolchain/quantizers/budget.py"


def peaks(plan: Plan) -> tuple[Peak, ...]:
    """Memory of ``quantize``: on a CPU, or on a GPU (``--quantize-on``); the least, with which it still runs.

    Of weights in the model's own dtype; empty where they stay as they are and nothing is measured on text.
    """
    if plan.weights.quant_algo is None and not plan.calibrates:
        return ()
    on_cpu, on_gpu = _need(plan, on_gpu=False), _need(plan, on_gpu=True)
    tokens = f", {plan.recipe.calibration.tokens} tokens of text at once" if plan.calibrates else ""
    how = f"a layer in hand{tokens}, on {usable_cores()} cores; --max-ram holds it to that"
    gpu = "only with --quantize-on cuda; without a GPU it is computed on the CPU, slower"
    return (
        Peak("quantize", "ram", max(on_cpu.ram, on_gpu.ram), how, _SOURCE),
        Peak("quantize", "vram", on_gpu.vram, gpu, _SOURCE),
    )


def _need(plan: Plan, *, on_gpu: bool) -> Need:
    asked, given = plan.recipe.quantization, plan.recipe.calibration
    scheme = Scheme(
        plan.weights.name,
        asked.group_size,
        asked.scales,
        plan.checkpoint_kv,
        asked.method if plan.weights.name == "int4" else "rtn",
        asked.clip,
        asked.fp8_scales,
        asked.propagate,
        calibrated=plan.calibrates,
        smoothquant_alpha=asked.smoothquant_alpha,
    )
    rows, tokens = (given.samples, given.tokens) if plan.calibrates else (0, 0)
    return least_need(
        Work(
            plan.config,
            scheme,
            plan.config.dtype_bytes,
            copied=plan.config.dtype == "float16",  # calibration.compute_dtype runs those in bfloat16
            rows=rows,
            row_tokens=tokens,
            threads=usable_cores(),
            on_gpu=on_gpu,
            quantizes=plan.weights.quant_algo is not None,
        )
    )
