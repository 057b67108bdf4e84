"""The text of a recipe for an option that was chosen, with the numbers that speak for it in comments. Pure.

What it writes is a recipe like any other: it is read back, and gives the plan that the option came from. It writes no
file and asks nobody.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from textwrap import wrap

from toolchain.planning.choice import GOALS, Choice
from toolchain.planning.choice_table import break_even_line
from toolchain.planning.forecast import KIND
from toolchain.planning.option import Option, holds
from toolchain.planning.plan import Plan
from toolchain.units import format_bytes

WIDTH = 100
_VERDICTS = {
    "met": "met, even if the estimates are as far off as they may be",
    "open": "within the error of the estimates: measure it",
    "missed": "missed, even if the estimates are as far off as they may be",
    "unreachable": "out of reach: the data sheet's peaks forbid it",
}
_PLAIN = re.compile(r"[A-Za-z0-9./][A-Za-z0-9./_+-]*")


def recipe_text(choice: Choice, option: Option, model: str, command: str) -> str:
    """The YAML of a recipe for an option that fits; ``command`` is the line that would write it again."""
    assert option.plan is not None
    plan = option.plan
    return "\n".join(
        [
            *_comment(f"Written by: {command}"),
            "#",
            *_comment(_why(choice, option, plan)),
            "#",
            *_comment(
                f"{_capital(KIND)}: times are of one prompt, or one step, without queue and server. {_band(option)}"
            ),
            *_assumed(option),
            "",
            f"description: {_scalar(_title(option, model))}",
            f"model: {_scalar(model)}",
            f"device: {option.device}",
            *([f"backend: {option.backend} # {_backend_why(plan)}"] if plan.recipe.backend else []),
            *(
                [f"services: {option.services} # copies on the same GPU, each with a cache of its own"]
                * (option.services > 1)
            ),
            *_reserve(plan),
            "",
            *_comment(_decision(plan, "weights") + "."),
            *_alternatives(choice, option),
            "quantization:",
            *_quantization(plan),
            "",
            *_comment(f"{_decision(plan, 'kv_cache')}. {_cache(option, plan)}"),
            "kv_cache:",
            f"  dtype: {option.kv}",
            *_cache_keys(plan),
            "",
            "limits:",
            *_limits(option, plan),
            *_rest(plan),
            *_warnings(option),
            "",
        ]
    )


def name_of(model: str, device: str) -> str:
    """``("meta-llama/Llama-2-13b-chat-hf", "l4")`` -> ``"llama-2-13b-chat-hf-l4"``: a name for the recipe's file."""
    stem = re.sub(r"[^a-z0-9.]+", "-", model.rstrip("/").removeprefix("hf:").rpartition("/")[2].lower()).strip("-.")
    return f"{stem or 'model'}-{device}"


def _title(option: Option, model: str) -> str:
    copies = f"{option.services} services of " if option.services > 1 else ""
    return f"{copies}{model.rstrip('/').rpartition('/')[2]} in {option.weights} on one {option.title}"


def _why(choice: Choice, option: Option, plan: Plan) -> str:
    load = f"{choice.load.prompt} tokens in and {choice.load.output} out"
    able = sum(one.fits for one in choice.ranked)
    place = next(place for place, one in enumerate(choice.ranked, 1) if one.name == option.name)
    count = len({one.device for one in choice.ranked})
    told = f"Chosen for {GOALS[choice.goal].title} with {load}: number {place} of {able} options that fit, "
    told += f"on {count} device{'s' * (count > 1)}. "
    if option.speed:
        speed = option.speed
        told += f"First token after {speed.ttft.seconds * 1000:.0f} ms (the data sheet's peaks allow "
        told += f"{speed.ttft.floor_s * 1000:.0f} ms), then one every {speed.itl.seconds * 1000:.1f} ms with "
        told += f"{speed.itl.batch} sequences in flight: {speed.tokens_per_s:.0f} tokens/s. "
        told += f"The SLO is {_VERDICTS[speed.verdict]}. " if speed.verdict else ""
    if option.usd_per_hour and option.price and option.tokens_per_usd:
        told += f"At ${option.usd_per_hour:g}/h ({option.price.vendor} {option.price.kind} {option.price.date}".rstrip()
        told += f") {option.tokens_per_usd / 1e6:.2f} million tokens for a dollar. "
    told += " ".join(break_even_line(one) for one in choice.break_even if one.winner == option.name)
    return told.strip() + f" Memory: {format_bytes(plan.memory.total)} taken."


def _band(option: Option) -> str:
    if option.speed is None:
        return "Nothing is estimated for a CPU."
    band = option.speed.ttft_band
    return f"They may be off by a factor of {1 + band.worst:.2f}: {band.why}."


def _assumed(option: Option) -> Iterator[str]:
    for text in option.speed.assumptions if option.speed else ():
        yield from _comment(f"Assumed: {text}.")


def _decision(plan: Plan, name: str) -> str:
    found = next(one for one in plan.decisions if one.name == name)
    return f"{found.name.replace('_', ' ')} {found.value}: {found.reason}".rstrip(".")


def _backend_why(plan: Plan) -> str:
    return f"the default of the {plan.device.title} does not take these formats"


def _reserve(plan: Plan) -> Iterator[str]:
    if plan.recipe.reserve:
        yield f"reserve: {plan.recipe.reserve} # others have this much of the device"
    elif plan.device.name.startswith("rtx"):
        yield "# reserve: 600MiB # where a desktop runs on the same GPU"


def _quantization(plan: Plan) -> Iterator[str]:
    """Every key that the recipe has there."""
    for key, value in plan.recipe.quantization.model_dump(exclude_unset=True).items():
        reason = {"method": "rounded by what each channel is worth; calibrated on text"}.get(key, "")
        yield f"  {key}: {_scalar(value)}" + (f" # {reason}" if reason and value == "awq" else "")


def _alternatives(choice: Choice, option: Option) -> Iterator[str]:
    """The best of each other format of weights on the same device."""
    told: list[str] = []
    seen = {option.weights}
    for one in choice.ranked:
        able = one.fits or one.why_not.startswith("memory: ")
        if able and one.device == option.device and one.services == option.services and one.weights not in seen:
            seen.add(one.weights)
            told.append(f"{one.weights}: {_short(one)}")
    if told:
        yield from _comment("Instead of it: " + "; ".join(told) + ".")


def _short(one: Option) -> str:
    if not one.fits:
        return one.why_not.removeprefix("memory: ").rstrip(".")
    if one.speed is None:
        return f"weights of {format_bytes(one.weight_bytes)}"
    held = f"{one.sequences} sequence{'s' * (one.sequences != 1)}"
    return f"TTFT {one.speed.ttft.seconds * 1000:.0f} ms, {one.speed.tokens_per_s:.0f} tokens/s, {held}"


def _cache(option: Option, plan: Plan) -> str:
    memory = plan.memory
    each = f"{format_bytes(memory.kv_bytes_per_token)} a token, {format_bytes(memory.kv_bytes_per_sequence)} a sequence"
    return f"{each}; it holds {holds(option)}."


def _cache_keys(plan: Plan) -> Iterator[str]:
    for key, value in plan.recipe.kv_cache.model_dump(exclude_unset=True).items():
        if key != "dtype" and value is not None:
            yield f"  {key}: {_scalar(value)}"


def _limits(option: Option, plan: Plan) -> Iterator[str]:
    limits, load = plan.limits, "prompt and output"
    yield f"  max_batch_size: {limits.max_batch_size} # sequences in flight, of {option.sequences} that the cache holds"
    yield f"  max_seq_len: {limits.max_seq_len} # {load}"
    yield f"  max_input_len: {limits.max_input_len} # the longest prompt"
    yield f"  max_num_tokens: {limits.max_num_tokens} # of one step; decides the memory of activations"


def _rest(plan: Plan) -> Iterator[str]:
    """What else the recipe named."""
    if plan.recipe.tensorrt_llm:
        yield f'\ntensorrt_llm: "{plan.recipe.tensorrt_llm}" # pinned'
    elif plan.release:
        yield ""
        yield from _comment(f"TensorRT-LLM {plan.release.version}: {_reason(plan, 'tensorrt_llm')}.")
    if plan.tp * plan.pp > 1:
        yield f"\nparallel:\n  tp: {plan.tp}\n  pp: {plan.pp}"


def _reason(plan: Plan, name: str) -> str:
    return next((one.reason for one in plan.decisions if one.name == name), "").rstrip(".")


def _warnings(option: Option) -> Iterator[str]:
    if option.cautions:
        yield ""
    for text in option.cautions:
        yield from _comment(f"Note: {text}.")


def _comment(text: str) -> Sequence[str]:
    """Lines of a comment; no line of it can end the comment."""
    plain = " ".join(text.split())
    return [f"# {line}" for line in wrap(plain, WIDTH - 2, break_long_words=False, break_on_hyphens=False)]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _scalar(value: object) -> str:
    """A value as YAML that is read back as the same: JSON, which YAML contains, unless it is a plain word."""
    plain = (
        isinstance(value, str)
        and _PLAIN.fullmatch(value)
        and not re.fullmatch(r"[0-9._+-]+|(?i:true|false|null|yes|no|on|off|y|n)", value)
    )
    return str(value) if plain else json.dumps(value, ensure_ascii=False)
