"""One prompt to a service, and its answer as it comes: ``model run`` and ``endpoint run``."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Callable

    from toolchain.console import Screen
    from toolchain.measuring.doors import Door

_MAX_PROMPT_BYTES = 4 * 2**20


def asked_flags(function: Callable[..., Any]) -> Callable[..., Any]:
    """The prompt, and how it is to be answered."""
    for option in (
        click.option(
            "--key", envvar="SCALELLM_API_KEY", default="", help="An API key of the gateway. [env: SCALELLM_API_KEY]"
        ),
        click.option(
            "--temperature",
            type=click.FloatRange(0, 2),
            help="0: the likeliest token each time. [default: the gateway's]",
        ),
        click.option("--max-tokens", type=click.IntRange(min=1), help="[default: 256, if the engine has room]"),
        click.argument("prompt", required=False),
    ):
        function = option(function)
    return function


def prompt_of(given: str | None) -> str:
    """The argument, or what stands on standard input."""
    if given is not None:
        return given
    if sys.stdin.isatty():
        raise click.UsageError("Give a prompt, or a text on standard input.")
    text = sys.stdin.read(_MAX_PROMPT_BYTES)
    if not text.strip():
        raise click.UsageError("The prompt on standard input is empty.")
    return text


def ask(screen: Screen, name: str, door: Door, prompt: str) -> None:
    """Writes the answer as it comes; as JSON, all of it with its times. Raises ScalellmError."""
    session, started, first_s, pieces = door.open(), time.perf_counter(), 0.0, []
    try:
        for piece in session.ask(prompt, 0, lambda: None):
            first_s = first_s or piece.at_s - started
            pieces.append(piece.text)
            if not screen.json_output:
                click.echo(piece.text, nl=False)
    finally:
        session.close()
    seconds = time.perf_counter() - started
    screen.say()
    screen.emit({"name": name, "text": "".join(pieces), "ttft_s": first_s, "seconds": seconds})
