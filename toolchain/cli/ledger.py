"""The verb ``ledger``: what an endpoint owes to whom, whether its ledger is as it was written, its newest record."""

from __future__ import annotations

import datetime
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toolchain.cli.flags import common, open_screen, work_flag

if TYPE_CHECKING:
    from toolchain.ledger.record import Head

_TARGET = click.argument("target", metavar="ENDPOINT|FILE")
_WORK = work_flag("Where the endpoints' folders lie.")
_GROUPS = ("provider", "node", "device", "replica", "day")


@click.group()
def ledger() -> None:
    """Who served what, and what was earned: the hash-chained ledger of an endpoint of `scalellm deploy`.

    \b
    Examples:
      scalellm ledger report my-llama --by provider,day
      scalellm ledger head my-llama > kept.txt
      scalellm ledger verify my-llama --head kept.txt
    """


@ledger.command()
@_TARGET
@click.option("--head", "kept", metavar="NUMBER:HASH|FILE", help="A head that was kept: shows what was cut off since.")
@_WORK
@common
def verify(target: str, kept: str | None, work: Path, json_output: bool, verbose: int) -> None:
    """Look at every record: was one changed, removed, put in or moved?

    What was cut off at the end, and a chain that was written anew, only a head can show that was kept elsewhere:
    `scalellm ledger head`, or an endpoint's /status. The exit code is 5 where something is wrong.

    \b
    Examples:
      scalellm ledger verify my-llama
      scalellm ledger verify ledger.sqlite --head 1440:5f2c...
    """
    from toolchain.errors import ArtifactError
    from toolchain.ledger.checking import verify as check

    screen = open_screen(json_output, verbose)
    found = check(_file(target, work), _head(kept) if kept else None)
    faults = [vars(fault) for fault in found.faults]
    head = str(found.head) if found.head else None
    screen.emit(
        {"sound": found.sound, "endpoint": found.endpoint, "records": found.records, "head": head, "faults": faults}
    )
    for fault in found.faults:
        screen.say(fault.what)
    if found.sound:
        screen.say(f"{found.endpoint}: {found.records} records, none changed. Head: {head}")
    sys.exit(0 if found.sound else ArtifactError.exit_code)


@ledger.command()
@_TARGET
@_WORK
@common
def head(target: str, work: Path, json_output: bool, verbose: int) -> None:
    """The number and hash of the newest record, to be kept elsewhere: it vouches for all records up to it.

    \b
    Example:
      scalellm ledger head my-llama > kept.txt
    """
    from toolchain.ledger.book import head_of, reading

    screen = open_screen(json_output, verbose)
    with reading(_file(target, work)) as connection:
        found = head_of(connection)
    screen.emit({"number": found.number, "hash": found.hash})
    screen.say(str(found))


@ledger.command()
@_TARGET
@click.option(
    "--by",
    default="provider,node",
    show_default=True,
    callback=lambda _ctx, param, text: _names(text, param),
    metavar="NAME[,NAME]",
    help=f"Of {', '.join(_GROUPS)}; a day is UTC's.",
)
@click.option("--since", type=click.DateTime(["%Y-%m-%d"]), metavar="YYYY-MM-DD", help="From this day on (UTC).")
@click.option("--until", type=click.DateTime(["%Y-%m-%d"]), metavar="YYYY-MM-DD", help="To the end of this day (UTC).")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV for a spreadsheet.")
@_WORK
@common
def report(
    target: str,
    by: tuple[str, ...],
    since: datetime.datetime | None,
    until: datetime.datetime | None,
    as_csv: bool,
    work: Path,
    json_output: bool,
    verbose: int,
) -> None:
    """GPU-seconds, tokens, answers and dollars, with their totals. Sums are exact; money is never rounded to cents.

    An answer that went on at another replica counts as one of `requests` where it began and of `continued` where it
    went on; its tokens count where they were made.

    \b
    Examples:
      scalellm ledger report my-llama
      scalellm ledger report my-llama --by provider,day --since 2026-11-01 --csv > november.csv
    """
    from toolchain.ledger.totals import COLUMNS
    from toolchain.ledger.totals import report as add_up

    if as_csv and json_output:
        raise click.UsageError("--csv or --json, not both.")
    screen = open_screen(json_output, verbose)
    found = add_up(_file(target, work), by, since and since.date(), until and until.date())
    if as_csv:
        click.echo(found.csv(), nl=False)
        return
    screen.emit({"by": list(by), "groups": list(found.lines()), "total": found.total.columns()})
    columns = (*by, *(name.replace("_", " ") for name in COLUMNS))
    lines = [[str(value) for value in line.values()] for line in found.lines()]
    lines.append(["total", *[""] * (len(by) - 1), *map(str, found.total.columns().values())])
    width = sum(max(map(len, column)) + 2 for column in zip(columns, *lines, strict=True))
    screen.table("", columns, lines, width=width)  # nothing of it is left out: elsewhere it wraps


def _names(text: str, param: click.Parameter) -> tuple[str, ...]:
    names = tuple(one.strip() for one in text.split(","))
    if wrong := [name for name in names if name not in _GROUPS]:
        raise click.BadParameter(f"{wrong[0]!r} is none of {', '.join(_GROUPS)}", param=param)
    if len(set(names)) < len(names):
        raise click.BadParameter("a name stands there twice", param=param)
    return names


def _file(target: str, work: Path) -> Path:
    """A file by its path, or that of an endpoint of this machine."""
    from toolchain.ledger.book import FILE

    path = Path(target)
    return path if path.is_file() or len(path.parts) > 1 else work / "endpoints" / target / FILE


def _head(text: str) -> Head:
    """From the text itself, or from a file with what ``ledger head`` printed. Raises UsageError."""
    import json

    from toolchain.ledger.record import Head

    path = Path(text)
    told: Any = path.read_text(encoding="utf-8") if ":" not in text and path.is_file() else text
    try:
        if told.lstrip().startswith("{"):
            found = json.loads(told)
            told = f"{found['number']}:{found['hash']}"
        return Head.parse(told)
    except (ValueError, KeyError, TypeError) as error:
        raise click.BadParameter(str(error), param_hint="--head") from None
