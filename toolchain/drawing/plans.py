"""Plans and comparisons as figures: memory by device, time to first token by format, economic score by device. Pure.

Every number is one of ``planning``'s; nothing is estimated here. What does not fit is drawn as large as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from toolchain.device import device
from toolchain.drawing.chart import Bar, Bars, Figure, Level, Line, Lines, Part, Stack, Stacks
from toolchain.drawing.palette import BLUE, DARK, GRAY, GREEN, ORANGE, PINK, SHADES, SKY, VERMILION
from toolchain.planning.choice import Choice
from toolchain.planning.forecast import KIND, band
from toolchain.planning.latency import Deployment, compute_format, factors, prefill, prefill_floor_s, unpacks
from toolchain.planning.memory import DRAFT, PROCESS, RESERVE, MemoryPlan
from toolchain.planning.option import Asked, Option, memory_needed
from toolchain.planning.plan import Plan
from toolchain.quantization import WEIGHTS
from toolchain.units import GIB, format_bytes, format_seconds

_TERMS: Mapping[str, tuple[int, float]] = {
    "attention weights": (BLUE, SHADES[0]),
    "MLP weights": (BLUE, SHADES[1]),
    "weight scales": (BLUE, SHADES[2]),
    "embedding": (SKY, SHADES[0]),
    "head": (SKY, SHADES[1]),
    "embedding or head": (SKY, SHADES[0]),
    "norms": (SKY, SHADES[3]),
    "norms and biases": (SKY, SHADES[3]),
    "KV cache": (ORANGE, SHADES[0]),
    "activations": (GREEN, SHADES[0]),
    "logits": (GREEN, SHADES[2]),
    "attention workspace": (VERMILION, SHADES[0]),
    PROCESS: (GRAY, SHADES[0]),
    "process and libraries": (GRAY, SHADES[0]),
    "runtime workspaces": (GRAY, SHADES[2]),
    RESERVE: (DARK, SHADES[0]),
}
"""Color and shade of each term of ``planning.memory``: weights blue, cache orange, what a step needs green."""

_WEIGHTS = {"none": BLUE, "fp8": ORANGE, "int8_sq": GREEN, "int4": PINK, "int8": VERMILION, "int4_fp8": SKY}
_SHORTEST, _LEAST_LONGEST = 64, 4096
"""Prompts that the curves begin at, and reach where the model does."""
_STEPS = 4
"""Points for each doubling of the prompt."""
_MOST_DEVICES = 6
"""Curves that can still be told apart, with room for their names."""


def plan_figures(plan: Plan, asked: Asked, options: Sequence[Option]) -> Iterator[Figure]:
    """A plan's memory, and TTFT on its device with each format of ``options``, which are all of that device."""
    limits = plan.limits
    note = f"{_spoken(plan.weights.name)} / {plan.kv.name}"
    stack = _stack(plan.device.title, note, plan.memory, f"{plan.memory.sequences_at_full_length} sequences at once")
    about = f"{_model(asked)}, up to {limits.max_batch_size} sequences of {limits.max_seq_len} tokens"
    yield _memory_figure([stack], f"{about}, {_services(plan.services)}", ranks=plan.tp * plan.pp)
    if plan.deployment:
        longest = max(limits.max_input_len, min(_LEAST_LONGEST, plan.config.max_position_embeddings))
        yield _formats_figure(plan.deployment, options, asked, longest, plan.limits.max_input_len)


def refused_figures(asked: Asked, memory: MemoryPlan) -> list[Figure]:
    """The memory of a recipe that does not fit."""
    recipe = asked.recipe
    note = f"{_spoken(recipe.quantization.weights)} / {recipe.kv_cache.dtype}"
    stack = _stack(device(recipe.device).title, note, memory, "")
    about = f"{_model(asked)}, {_services(memory.services)}"
    return [_memory_figure([stack], about, ranks=recipe.parallel.tp * recipe.parallel.pp)]


def choice_figures(choice: Choice, asked: Asked) -> Iterator[Figure]:
    """Memory, TTFT and score of the best option of each device; of one device, of each format of its weights."""
    several = len({one.device for one in choice.ranked}) > 1
    shown = _best_of_each(choice.ranked, several=several)
    stacks = []
    for one in shown:
        memory = memory_needed(asked, one)
        if memory:
            stacks.append(_option_stack(one, memory, several=several))
    load = f"{choice.load.prompt} tokens in, {choice.load.output} out"
    about = f"{_model(asked)}; {load}; the best formats of each device for {choice.goal}" if several else _model(asked)
    left_out = [one for one in shown if memory_needed(asked, one) is None]
    if left_out:
        about += f". Not drawn: {', '.join(one.title for one in left_out)}, where nothing of this runs"
    if stacks:
        yield _memory_figure(stacks, about, ranks=max(one.gpus for one in shown))
    best = next((one for one in choice.ranked if one.fits and one.plan and one.plan.deployment), None)
    if best and best.plan and best.plan.deployment:
        longest = min(_LEAST_LONGEST, asked.config.max_position_embeddings)
        here = [one for one in choice.ranked if one.device == best.device]
        yield _formats_figure(best.plan.deployment, here, asked, max(longest, choice.load.prompt), choice.load.prompt)
        if several:
            yield _devices_figure(shown, asked, max(longest, choice.load.prompt))
    scored = _scored(choice, several=several)
    if scored:
        yield _score_figure(scored, choice, several=several)


def _model(asked: Asked) -> str:
    return asked.recipe.model


def _services(count: int) -> str:
    return "one service" if count == 1 else f"{count} services"


def _spoken(weights: str) -> str:
    return "fp16" if weights == "none" else weights


def _best_of_each(ranked: Sequence[Option], *, several: bool) -> list[Option]:
    """The first of each device, or of each format of weights; where none fits, the first that is only too large."""
    found: dict[str, Option] = {}
    for one in ranked:
        name = one.device if several else one.weights
        kept = found.setdefault(name, one)
        if not kept.fits and not kept.why_not.startswith("memory: ") and one.why_not.startswith("memory: "):
            found[name] = one
    return list(found.values())


def _option_stack(one: Option, memory: MemoryPlan, *, several: bool) -> Stack:
    formats = f"{_spoken(one.weights)} / {one.kv}" + (f", {_services(one.services)}" if one.services > 1 else "")
    at_once = min(one.sequences, one.limits.max_batch_size) if one.limits else 0
    held = f"{at_once} at once" if one.fits else ""
    return _stack(one.title if several else formats, formats if several else one.title, memory, held)


def _stack(name: str, note: str, memory: MemoryPlan, held: str) -> Stack:
    lines = [line for line in memory.lines if line.bytes]
    drafts = [line.name for line in lines if line.name.startswith(DRAFT)]
    parts = []
    for line in lines:
        color, shade = _TERMS.get(line.name, (PINK, 0.0))
        if line.name in drafts:
            color, shade = PINK, SHADES[drafts.index(line.name) % len(SHADES)]
        parts.append(Part(line.name, line.bytes / GIB, format_bytes(line.bytes), color, shade))
    total = f"{memory.total / GIB:.2f}"
    if memory.available is None:
        label = f"{total} GiB"
    elif memory.missing_bytes:
        label = f"does not fit: {format_bytes(memory.missing_bytes)} too much"
    else:
        label = f"{total} of {memory.available / GIB:.2f} GiB" + (f", {held}" if held else "")
    limit = None if memory.available is None else memory.available / GIB
    return Stack(name, tuple(parts), limit, note, label, bad=bool(memory.missing_bytes))


def _memory_figure(stacks: Sequence[Stack], about: str, *, ranks: int) -> Figure:
    each = f" Of one of {ranks} GPUs, the fullest." if ranks > 1 else ""
    beyond = " What is striped does not fit." if any(stack.bad for stack in stacks) else ""
    return Figure(
        "Memory of the device",
        Stacks(tuple(stacks), "GiB (2^30 bytes)", room="what the device has, as its driver reports it; gray is free"),
        caption=f"Every term that the plan counts, over all services.{each}{beyond}",
        conditions=f"{about}. Computed, not measured; scalellm plan prints the formula of each term.",
    )


def _formats_figure(made: Deployment, options: Iterable[Option], asked: Asked, longest: int, marked: int) -> Figure:
    """TTFT on one device with each format of the weights that runs there, the slowest first; what does not fit too."""
    fits: dict[str, bool] = {}
    for one in options:
        if one.fits or one.why_not.startswith("memory: "):
            fits[one.weights] = fits.get(one.weights, False) or one.fits
    lines: list[Line] = []
    for name, scheme in WEIGHTS.items():
        if name in fits and (made.device.arch, compute_format(scheme)) in factors().compute:
            told = _spoken(name) + (", unpacked" if unpacks(scheme) else "") + ("" if fits[name] else ": does not fit")
            line = _line(replace(made, weights=scheme), told, longest, marked, _WEIGHTS.get(name, DARK))
            lines.append(replace(line, faint=not fits[name]))
    lines.sort(key=lambda line: -line.points[-1][1])
    gpus = f" x {made.tp * made.pp}" if made.tp * made.pp > 1 else ""
    unpacked = " Unpacked weights become wider numbers before they are multiplied: that saves memory, not time."
    note = unpacked if any("unpacked" in line.name for line in lines) else ""
    error = band(made, "ttft_ms")
    typical = "" if error.typical is None else f", mostly by {error.typical:.0%}"
    off = f"may be off by a factor of {1 + error.worst:.2f}{typical}: {error.why}"
    return _ttft_figure(f"Time to first token on the {made.device.title}{gpus}", lines, asked, longest, note, off)


def _devices_figure(shown: Sequence[Option], asked: Asked, longest: int) -> Figure:
    """TTFT of the best option of each device, of the first few."""
    able = [(one, one.plan.deployment) for one in shown if one.plan and one.plan.deployment][:_MOST_DEVICES]
    drawn = [
        _line(made, f"{one.title} {_spoken(one.weights)}", longest, asked.load.prompt, color)
        for color, (one, made) in enumerate(able)
    ]
    lines = sorted((replace(line, floor=()) for line in drawn), key=lambda line: -line.points[-1][1])
    errors = {one.title: f"{1 + band(made, 'ttft_ms').worst:.2f}" for one, made in able}
    off = f"may be off by these factors: {', '.join(f'{name} {times}' for name, times in errors.items())}"
    note = f" The best {len(able)} devices, each with its best formats."
    return _ttft_figure("Time to first token by device", lines, asked, longest, note, off)


def _line(made: Deployment, name: str, longest: int, marked: int, color: int) -> Line:
    prompts = sorted({*_prompts(longest), marked})
    seconds = [prefill(made, tokens).total_s for tokens in prompts]
    times = 1 + band(made, "ttft_ms").worst
    return Line(
        name,
        tuple(zip(map(float, prompts), seconds, strict=True)),
        low=tuple(one / times for one in seconds),
        high=tuple(one * times for one in seconds),
        floor=tuple(prefill_floor_s(made, tokens) for tokens in prompts),
        color=color,
        marked=tuple(float(one) for one in sorted({*_doublings(longest)[-4:], marked})),
    )


def _doublings(longest: int) -> list[int]:
    found = [_SHORTEST]
    while found[-1] * 2 <= longest:
        found.append(found[-1] * 2)
    return found


def _prompts(longest: int) -> list[int]:
    """From the shortest to the longest prompt, evenly on a logarithmic axis, with every doubling."""
    points = {round(one * 2 ** (step / _STEPS)) for one in _doublings(longest) for step in range(_STEPS)}
    return sorted({one for one in points if one <= longest} | {longest})


def _ttft_figure(title: str, lines: Sequence[Line], asked: Asked, longest: int, note: str, off: str) -> Figure:
    limit = asked.slo.ttft_s
    return Figure(
        title,
        Lines(
            tuple(lines),
            "tokens of the prompt",
            "time to first token",
            y_text=format_time,
            x_log=True,
            y_log=True,
            x_ticks=tuple(map(float, _doublings(longest))),
            levels=(Level(limit, f"limit: {format_time(limit)}"),) if limit else (),
            floor="floor: no faster by the data sheet",
            band="how far the estimate may be off",
        ),
        caption=f"One prompt at a time, without queue and server; both axes are logarithmic.{note}",
        conditions=f"{_model(asked)}; {KIND}. It {off}.",
    )


def format_time(seconds: float) -> str:
    """0.05 -> ``"50 ms"``, 0.0005 -> ``"0.5 ms"``, 2 -> ``"2 s"``: short enough for a tick."""
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1000:.3g} ms"


def _scored(choice: Choice, *, several: bool) -> list[Option]:
    """The option with the best score of each device, or of each format; those without a score last."""
    found: dict[str, Option] = {}
    for one in choice.ranked:
        if one.fits and one.score:
            name = one.device if several else one.weights
            kept = found.get(name)
            if kept is None or _value(one) > _value(kept):
                found[name] = one
    return sorted(found.values(), key=lambda one: -_value(one))


def _value(one: Option) -> float:
    return one.score.value or 0.0 if one.score else 0.0


def _score_figure(scored: Sequence[Option], choice: Choice, *, several: bool) -> Figure:
    bars = tuple(_score_bar(one, choice, several=several) for one in scored)
    prices = dict.fromkeys(
        " ".join(filter(None, (one.price.vendor, one.price.kind, one.price.date))) for one in scored if one.price
    )
    limit = f", none beyond {format_seconds(choice.slo.ttft_s)}" if choice.slo.ttft_s else ""
    return Figure(
        "Economic score by device" if several else f"Economic score on the {scored[0].title}",
        Bars(bars),
        caption="services / (TTFT in s x price in $/h), as FEDML counts it: longer is more service for the money.",
        conditions=f"TTFT: {KIND}, of a prompt of {choice.load.prompt} tokens{limit}; thin lines: how far the score "
        f"may be off with it. Prices: {'; '.join(prices)}. As of {choice.today.isoformat()}.",
    )


def _score_bar(one: Option, choice: Choice, *, several: bool) -> Bar:
    assert one.score
    assert one.speed
    value, times = one.score.value, 1 + one.speed.ttft_band.worst
    formats = f"{_spoken(one.weights)}/{one.kv}"
    services = f" x {one.services}" if one.services > 1 else ""
    note = f"{format_time(one.score.latency_s)}, ${one.score.usd_per_hour:g}/h"
    return Bar(
        one.title if several else f"{formats}{services}",
        value,
        "over the limit" if value is None else f"{value:.2f}",
        f"{formats}{services}, {note}" if several else note,
        low=None if value is None else value / times,
        high=None if value is None else value * times,
    )
