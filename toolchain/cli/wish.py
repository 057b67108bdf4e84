"""What one may wish of a plan, as flags: limits, services, requests, prices; and the question that they make."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from toolchain.cli.flags import PATH, Function
from toolchain.errors import RecipeError

if TYPE_CHECKING:
    from toolchain.console import Screen
    from toolchain.planning.load import Load, Slo
    from toolchain.planning.option import Asked
    from toolchain.planning.price_list import PriceList
    from toolchain.recipe import Recipe

GOALS = ("ttft", "throughput", "density", "cost")
PROMPT_TOKENS, OUTPUT_TOKENS = 1024, 256
"""The load that is assumed where neither a flag nor a recipe says one."""

STEP_TOKENS = 4096
"""max_num_tokens where there is no recipe: the builder's 8192 take twice the memory for activations."""


def _services(_ctx: click.Context, param: click.Parameter, text: str | None) -> int | str | None:
    if text is None or text == "auto":
        return text
    if not text.isdigit() or not 1 <= int(text) <= 64:
        raise click.BadParameter(f"{text!r}: a number from 1 to 64, or auto", param=param)
    return int(text)


def _reserve(_ctx: click.Context, param: click.Parameter, text: str | None) -> str | None:
    from toolchain.units import parse_bytes

    try:
        if text is not None and not parse_bytes(text):
            raise ValueError(f"{text!r}: more than nothing")
    except ValueError as error:
        raise click.BadParameter(str(error), param=param) from error
    return text


def _slo(_ctx: click.Context, param: click.Parameter, text: str | None) -> Slo | None:
    from toolchain.planning.load import Slo

    try:
        return None if text is None else Slo.parse(text)
    except ValueError as error:
        raise click.BadParameter(str(error), param=param) from error


def choice_flags(function: Function) -> Function:
    """What is wanted, of which requests, at which prices: the same for ``plan`` and ``init``."""
    options: list[Callable[[Function], Function]] = [
        click.option("--slo", callback=_slo, metavar="ttft=1s,itl=50ms", help="Limits that come before the goal."),
        click.option(
            "--services", callback=_services, metavar="N|auto", help="Copies on one device; auto tries all that fit."
        ),
        click.option("--prompt", type=click.IntRange(min=1), metavar="TOKENS", help="Tokens in. [default: 1024]"),
        click.option("--output", type=click.IntRange(min=1), metavar="TOKENS", help="Tokens out. [default: 256]"),
        click.option(
            "--reserve", callback=_reserve, metavar="SIZE", help="Leave this of the device to others, such as 600MiB."
        ),
        click.option(
            "--price", "own_prices", multiple=True, metavar="[DEVICE=]USD", help="Dollars per hour that you pay."
        ),
        click.option(
            "--prices", "price_file", type=PATH, metavar="FILE", help="Your prices instead of the public ones."
        ),
        click.option(
            "--old-after",
            "old_days",
            type=click.IntRange(min=1),
            default=180,
            show_default=True,
            metavar="DAYS",
            help="Mark prices that are older.",
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function


@dataclass(frozen=True)
class Wish:
    """The flags of ``choice_flags``."""

    slo: Slo | None = None
    services: int | str | None = None
    prompt: int | None = None
    output: int | None = None
    reserve: str | None = None
    own_prices: tuple[str, ...] = ()
    price_file: Path | None = None
    old_days: int = 180

    @property
    def given(self) -> bool:
        """Whether any of them was."""
        numbers = (self.services, self.prompt, self.output, self.reserve)
        return any((self.slo, self.own_prices, self.price_file, *numbers))

    def words(self) -> list[str]:
        """The flags as they would be typed again."""
        slo = (
            [f"{key}={value:g}s" for key, value in (("ttft", self.slo.ttft_s), ("itl", self.slo.itl_s)) if value]
            if self.slo
            else []
        )
        pairs = (("--slo", ",".join(slo)), ("--services", self.services), ("--prompt", self.prompt))
        pairs += (("--output", self.output), ("--reserve", self.reserve))  # type: ignore[assignment]
        pairs += (("--prices", self.price_file),)  # type: ignore[assignment]
        named = [("--price", price) for price in self.own_prices]
        return [str(word) for flag, value in (*pairs, *named) if value for word in (flag, value)]

    def prices(self) -> PriceList:
        """What counts as a price."""
        from toolchain.planning.price_list import PriceList, named, read_prices
        from toolchain.problems import read_text

        own, every = named(self.own_prices)
        rows = read_prices(read_text(self.price_file, "file of prices"), self.price_file) if self.price_file else None
        return PriceList(rows, own, every, self.old_days)


def asked_for(
    screen: Screen, recipe: str | None, model: str | None, work: Path, names: str | None, wish: Wish
) -> tuple[Asked, list[str]]:
    """What is compared, and on which devices."""
    from toolchain.device import device, devices
    from toolchain.pipeline import look
    from toolchain.planning.load import Slo
    from toolchain.planning.option import Asked
    from toolchain.recipe import load_recipe

    prices = wish.prices()
    chosen = [device(name.strip()).name for name in names.split(",")] if names and names != "all" else list(devices())
    if recipe is None:
        assert model is not None
        base = _plain_recipe(model, chosen[0], wish)
    else:
        base = load_recipe(recipe)
        changes = {"model": model, "reserve": wish.reserve}
        base = base.model_copy(update={key: value for key, value in changes.items() if value})
        chosen = chosen if names else [base.device]
    found, draft = look(base, work, screen)
    services = base.services if wish.services is None else None if wish.services == "auto" else int(wish.services)
    asked = Asked(
        base,
        found.config,
        _load(base, found.config.max_position_embeddings, wish),
        wish.slo or Slo(),
        services,
        prices,
        draft,
        found.quantized,
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    )
    return asked, chosen


def _plain_recipe(model: str, device: str, wish: Wish) -> Recipe:
    """A recipe that says nothing but the load."""
    from toolchain.planning.starter import name_of
    from toolchain.recipe import Recipe

    prompt, output = wish.prompt or PROMPT_TOKENS, wish.output or OUTPUT_TOKENS
    limits = {"max_seq_len": prompt + output, "max_input_len": prompt, "max_num_tokens": max(prompt, STEP_TOKENS)}
    name = name_of(model, "")[:-1][:64]
    kept = {"reserve": wish.reserve} if wish.reserve else {}
    return Recipe.model_validate({"name": name, "model": model, "device": device, "limits": limits, **kept})


def _load(recipe: Recipe, positions: int, wish: Wish) -> Load:
    """Tokens in and out: the flags', within the recipe's limits. Raises RecipeError where they are longer."""
    from toolchain.planning.load import Load

    longest = recipe.limits.max_seq_len or positions
    most = min(recipe.limits.max_input_len or longest, longest - 1)
    prompt = wish.prompt or min(PROMPT_TOKENS, most)
    if prompt > most:
        raise RecipeError(f"--prompt {prompt}: the longest prompt has {most} tokens", hint=f"--prompt {most}")
    output = wish.output or min(OUTPUT_TOKENS, longest - prompt)
    if prompt + output > longest:
        room = longest - prompt
        raise RecipeError(
            f"--output {output}: a sequence has {longest} tokens, {prompt} of them the prompt", hint=f"--output {room}"
        )
    return Load(prompt, output)
