"""The verbs on reports of bench: report (a page or a picture), compare, schema."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from toolchain.cli.flags import PATH, common, open_screen

if TYPE_CHECKING:
    from toolchain.measuring.report import Report
    from toolchain.measuring.statistics import Ratio


def check_place(path: Path) -> None:
    """Before anything is measured: whether a picture can be drawn to ``path``. Raises a ScalellmError."""
    from toolchain.drawing import check

    check(path)


def draw(reports: Sequence[Report], path: Path) -> None:
    """Reports side by side as one page or picture."""
    from toolchain.drawing import save
    from toolchain.measuring.figures import figures
    from toolchain.measuring.tables import about, tables

    title = "Latency and throughput: " + " beside ".join(dict.fromkeys(one.title for one in reports))
    results, *more = tables(reports)
    save([results, *figures(reports), *more], path, title=title, about=about(reports))


@click.command()
@click.argument("files", type=PATH, nargs=-1, required=True, metavar="FILE.json...")
@click.option("-o", "--out", type=PATH, default=Path("report.html"), show_default=True, metavar="FILE.html|svg|png")
@common
def report(files: tuple[Path, ...], out: Path, json_output: bool, verbose: int) -> None:
    """Draw one or several reports: distributions, prompt lengths, throughput, memory, conditions, passports.

    A page (.html) stands alone, in light and dark; a picture (.svg, .png) has its figures only. Where the service was
    built from a recipe for a GPU, the plan's estimates and the data sheet's floor are drawn in.

    \b
    Examples:
      scalellm bench report report.json
      scalellm bench report ours.json theirs.json -o side-by-side.html
    """
    from toolchain.measuring.report import read

    screen = open_screen(json_output, verbose)
    check_place(out)
    draw([read(file) for file in files], out)
    screen.say(f"drawn: {out}")
    screen.emit({"reports": [str(file) for file in files], "drawn": str(out)})


@click.command()
@common
def schema(json_output: bool, verbose: int) -> None:
    """Print the JSON Schema of report.json."""
    import json

    from toolchain.measuring.report import schema as made

    click.echo(json.dumps(made(), indent=2))


@click.command()
@click.argument("a", type=PATH)
@click.argument("b", type=PATH)
@click.option(
    "--other-prompts",
    is_flag=True,
    help="Role-play prompts of the same lengths may be of another --seed: for one server that was measured twice.",
)
@common
def compare(a: Path, b: Path, other_prompts: bool, json_output: bool, verbose: int) -> None:
    """Ratios of two reports, B over A, with 95 % bootstrap intervals; refused when they were not asked the same."""
    from dataclasses import asdict

    from toolchain.measuring.compare import compare as compared
    from toolchain.measuring.report import read

    screen = open_screen(json_output, verbose)
    reports = read(a), read(b)
    found = compared(*reports, other_prompts=other_prompts)
    for one in found:
        asked = one.conditions
        rows = [
            (line.quantity, _value(line.quantity, line.a), _value(line.quantity, line.b), *_ratio(line.ratio))
            for line in one.lines
        ]
        title = f"{asked.input_tokens or 'mixed'} in, {asked.output_tokens or 'mixed'} out, {asked.load}"
        screen.table(title, ("", f"A: {reports[0].title}", f"B: {reports[1].title}", "B / A", "95 %"), rows)
    lines = [{"conditions": one.conditions.model_dump(), "lines": [asdict(x) for x in one.lines]} for one in found]
    screen.emit({"a": str(a), "b": str(b), "runs": lines})


def _value(quantity: str, value: float) -> str:
    from toolchain.units import milliseconds

    return f"{value:.1f}" if quantity.startswith("tokens") else milliseconds(value)


def _ratio(ratio: Ratio) -> tuple[str, str]:
    same = "" if ratio.differs else "   no difference shown"
    return f"{ratio.value:.3f}", f"{ratio.low:.3f} to {ratio.high:.3f}{same}"
