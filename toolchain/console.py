"""What a person sees: tables, bars and explanations; or, with ``--json``, one object on standard output.

Bars and notes go to standard error, so that standard output can be piped. It decides nothing.
"""

from __future__ import annotations

import datetime
import json
import sys
import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

from toolchain.errors import RecipeError, ScalellmError
from toolchain.planning.build_peaks import Peak
from toolchain.planning.choice_table import Sheet
from toolchain.planning.forecast import Estimate, Forecast
from toolchain.planning.plan import Plan
from toolchain.planning.price_list import age_days
from toolchain.progress import Task
from toolchain.units import MIB, format_bytes, format_count, format_seconds

_REMARKS_WIDTH = 50
_QUIET_LINE_EVERY_S = 10.0


class Screen:
    """Where a command writes. ``json_output`` keeps standard output for one JSON object."""

    def __init__(self, *, json_output: bool = False, verbose: int = 0) -> None:
        self.json_output = json_output
        self.verbose = verbose
        self.out = Console(highlight=False, soft_wrap=True)
        self.err = Console(stderr=True, highlight=False, soft_wrap=True)

    def say(self, text: str = "") -> None:
        """One line for the person; silent with ``--json``."""
        if not self.json_output:
            self.out.print(text, markup=False)

    def detail(self, text: str) -> None:
        """One line for the curious, on standard error: only with ``-v``."""
        if self.verbose:
            self.err.print(text, markup=False, style="dim")

    def note(self, text: str) -> None:
        """``Progress.note``: one line on standard error."""
        self.err.print(text, markup=False, style="dim")

    def task(self, label: str, total: int, unit: str) -> Task:
        """``Progress.task``: a bar on a terminal, a line now and then elsewhere."""
        return _Bar(self.err, label, total, unit) if self.err.is_terminal else _Lines(self.err, label, total, unit)

    def emit(self, value: Any) -> None:
        """The one JSON object of ``--json``."""
        if self.json_output:
            json.dump(value, sys.stdout, indent=2, ensure_ascii=False, default=str)
            sys.stdout.write("\n")
            sys.stdout.flush()

    def table(
        self, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, width: int | None = None
    ) -> None:
        """A table; the first column is a name, the last may wrap. ``width``: instead of the terminal's."""
        if self.json_output:
            return
        table = Table(
            title=title,
            title_justify="left",
            title_style="bold",
            header_style="bold",
            box=None,
            pad_edge=False,
            width=width,
        )
        for index, column in enumerate(columns):
            table.add_column(column, no_wrap=index < len(columns) - 1, overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        self.out.print(table, crop=width is None)

    def plan(self, plan: Plan, source: str, peaks: Sequence[Peak] = (), *, explain: bool = False) -> None:
        """Every decision with its reason, the memory line by line, what making it takes, prices and warnings.

        ``explain``: each reason with the source of its rule.
        """
        self.table(
            f"{plan.recipe.name}: {source} on {plan.device.title}",
            ("decision", "value", "because"),
            [(one.name, str(one.value), one.explained if explain else one.reason) for one in plan.decisions],
        )
        memory = plan.memory
        device = "" if memory.available is None else f"of {format_bytes(memory.available)} on the device"
        rows = [(line.name, format_bytes(line.bytes), line.how) for line in memory.lines]
        self.say()
        self.table("memory", ("term", "size", "how"), [*rows, ("total", format_bytes(memory.total), device)])
        free = "" if memory.free_bytes is None else f", and {memory.free_bytes // MIB} MiB free"
        self.say(
            f"\nFits, with {memory.max_kv_tokens} tokens of KV cache: "
            f"{memory.sequences_at_full_length} sequences at full length per service{free}."
        )
        self.say()
        made = [(peak.stage, peak.resource, format_bytes(peak.bytes), f"{peak.how} ({peak.source})") for peak in peaks]
        self.table("what making it takes", ("stage", "of", "size", "how"), made)
        self._speed(plan.latency)
        today = datetime.date.today()
        for price in plan.prices:
            when = f"{price.date}, {age_days(price, today)} days old"
            self.say(f"price: ${price.usd_per_hour}/h {price.vendor} {price.kind} ({when}, {price.source})")
        for warning in plan.warnings:
            self.say(f"note: {warning}")

    def _speed(self, speed: Forecast | None) -> None:
        """What a plan says of latency and throughput, with floors, errors and what was assumed."""
        if speed is None:
            self.say("Speed: no estimate for a CPU, of which no published factors hold elsewhere; measure it.")
            return
        rows = [(f"TTFT, {one.tokens} tokens", format_seconds(one.seconds), _floor(one)) for one in speed.ttft]
        rows += [(f"ITL, batch {one.batch}", _milliseconds(one.seconds), _floor(one)) for one in speed.itl]
        load = f"{speed.sequences} in flight, {speed.prompt} in, {speed.output} out"
        self.say()
        self.table(
            f"speed of one service alone on its GPU ({speed.kind})",
            ("what", "estimate", "floor: the data sheet's peaks"),
            [*rows, ("tokens/s", f"{speed.tokens_per_s:.0f}", f"at most {speed.ceiling_tokens_per_s:.0f}; {load}")],
        )
        band = speed.ttft_band
        typical = "" if band.typical is None else f", mostly by {band.typical:.0%}"
        self.say(f"Estimates may be off by a factor of {1 + band.worst:.2f}{typical}: {band.why}.")
        for assumption in speed.assumptions:
            self.say(f"assumed: {assumption}")

    def sheet_of(self, sheet: Sheet) -> None:
        """A choice as a table, and what is to be known of it. It is never cut: a narrow terminal breaks its lines."""
        fixed = [max(map(len, column)) + 1 for column in zip(sheet.columns, *sheet.rows, strict=True)][:-1]
        self.table(sheet.title, sheet.columns, sheet.rows, width=max(self.out.width, sum(fixed) + _REMARKS_WIDTH))
        self.say()
        for note in sheet.notes:
            self.say(note)

    def inspection(self, found: Any) -> None:
        """What a folder is (``stages.inspect.Inspection``), and what to type."""
        one = found.identity
        use = {"direct": "yes, as it is", "import": "yes, imported first", "refused": "no"}[one.use]
        size = f"{found.architecture}, {format_count(found.parameters)} parameters, {found.layers} layers"
        quantized = [one.group_size and f"groups of {one.group_size}", one.zero_points and "zero points"]
        quantized += [one.act_order and "act order", one.kv != "fp16" and f"{one.kv} cache"]
        rows = [
            ("what", one.title),
            ("model", f"{size}, {found.dtype}" if found.architecture else "not of a family that scalellm knows"),
            ("weights", ", ".join([one.weights or "of no kind that a recipe has", *filter(None, quantized)])),
            ("calibrated", "yes" if found.calibrated else "no sign of it"),
            ("written by", found.identity.producer or "not said"),
            ("files", f"{found.weight_files} with weights, {format_bytes(found.nbytes)} in all"),
            ("stamp", found.stamp or "none of scalellm's"),
            ("usable", f"{use}. {one.reason}".strip(". ") + "."),
            *(("note", note) for note in one.notes),
        ]
        self.table(str(one.path), ("", ""), rows)
        self.say(f"Next: {found.next}" if found.next else "")

    def sheet(self, found: Any) -> None:
        """What an engine, a repository or a TensorRT-LLM checkpoint is (``stages.inspect.Sheet``)."""
        warnings = [("WARNING", text) for text in found.warnings]
        self.table(str(found.path), ("", ""), [*found.rows, *warnings])
        self.say(f"Next: {found.next}" if found.next else "")

    def findings(self, found: Iterable[Any]) -> None:
        """What ``doctor`` looked at (``stages.doctor.Finding``): a line each, with what to do where it is not well."""
        marks = {"absent": "-"}
        told = [
            (marks.get(f.level, f.level), f.name, f.text if f.ok or not f.hint else f"{f.text}   try: {f.hint}")
            for f in found
        ]
        self.table("", ("", "what", "found"), told)

    def serving(self, info: Any) -> None:
        """Where the server can be reached, and a command to try (``stages.serve.ServingInfo``)."""
        self.emit(vars(info))
        name = f"Service {info.service}: " if info.service else ""
        self.say(f"{name}{info.server} is ready: first token after {format_seconds(info.start_s)} (pid {info.pid}).")
        for name, text in (
            ("HTTP", info.http_url),
            ("gRPC", info.grpc_url),
            ("metrics", info.metrics_url),
            ("log", info.log),
        ):
            self.say(f"  {name:<8} {text}")
        if info.unverified:
            self.say(f"NOT VERIFIED: {info.unverified}")
        self.say(f"Try:\n  {info.sample}\nCtrl-C stops it.")

    def error(self, error: ScalellmError) -> None:
        """The error, every problem on its own line, and the next thing to type."""
        if self.json_output:
            problems = [vars(problem) for problem in error.problems] if isinstance(error, RecipeError) else []
            kind = type(error).__name__
            self.emit({"error": kind, "message": error.message, "hint": error.hint, "problems": problems})
            return
        self.err.print(Text.assemble(("error: ", "bold red"), error.message))
        if isinstance(error, RecipeError):
            for problem in error.problems:
                self.err.print(Text(f"  {problem}"))
        for index, line in enumerate(error.hint.splitlines()):
            self.err.print(Text.assemble(("  try: " if index == 0 else "       ", "bold green"), line))


def _milliseconds(seconds: float) -> str:
    """0.00586 -> ``"5.9 ms"``: steps of one token are too short for ``format_seconds``."""
    return f"{seconds * 1000:.1f} ms"


def _floor(one: Estimate) -> str:
    return f"{_milliseconds(one.floor_s)}, context {one.tokens}" if one.batch > 1 else _milliseconds(one.floor_s)


class _Bar:
    """A live bar with percentage, amount, speed and time left."""

    def __init__(self, console: Console, label: str, total: int, unit: str) -> None:
        amount: list[ProgressColumn] = (
            [DownloadColumn(binary_units=True), TransferSpeedColumn()]
            if unit == "bytes"
            else [MofNCompleteColumn(), TextColumn(unit)]
        )
        self._progress = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            *amount,
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._label = label
        self._task = self._progress.add_task(label, total=total)

    def advance(self, amount: int) -> None:
        self._progress.advance(self._task, amount)

    def describe(self, text: str) -> None:
        self._progress.update(self._task, description=f"{self._label}: {text}")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()


class _Lines:
    """For logs and pipes: a line at the end, and one every ten seconds of longer work."""

    def __init__(self, console: Console, label: str, total: int, unit: str) -> None:
        self._console = console
        self._label, self._total, self._unit = label, max(total, 1), unit
        self._done, self._text = 0, ""
        self._started = self._last = time.monotonic()

    def advance(self, amount: int) -> None:
        self._done += amount
        now = time.monotonic()
        if now - self._last >= _QUIET_LINE_EVERY_S:
            self._last = now
            left_s = (now - self._started) * (self._total - self._done) / max(self._done, 1)
            share = 100 * self._done / self._total
            self._console.print(f"{self._label}: {share:.0f} % {self._text}, {left_s:.0f} s left", markup=False)

    def describe(self, text: str) -> None:
        self._text = text

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._console.print(f"{self._label}: done in {time.monotonic() - self._started:.1f} s", markup=False)
