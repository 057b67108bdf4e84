"""Why a build failed, from the end of its log and its exit code: ``facts/build_failures.yaml``."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass

from toolchain import workspace
from toolchain.host import EngineJob


@dataclass(frozen=True)
class Cause:
    """What most likely went wrong, and what to do about it."""

    message: str
    advice: tuple[str, ...]
    source: str


@dataclass(frozen=True)
class _Known:
    pattern: re.Pattern[str] | None
    exit_codes: frozenset[int]
    cause: str
    advice: tuple[str, ...]
    source: str


@functools.cache
def _table() -> tuple[_Known, ...]:
    return tuple(
        _Known(
            re.compile(row["pattern"], re.MULTILINE) if "pattern" in row else None,
            frozenset(row.get("exit_codes", ())),
            row["cause"],
            tuple(row["advice"]),
            row["source"],
        )
        for row in workspace.facts("build_failures")
    )


def diagnose(text: str, exit_code: int, job: EngineJob) -> Cause | None:
    """The first entry of the table that the end of the log, or the exit code, speaks for; None where none does."""
    for known in _table():
        found = known.pattern.search(text) if known.pattern else None
        if found or exit_code in known.exit_codes:
            words = {**_words(job), **(found.groupdict() if found else {})}
            advice = tuple(line.format(**words) for line in known.advice)
            return Cause(known.cause.format(**words), advice, known.source)
    return None


def _words(job: EngineJob) -> Mapping[str, str]:
    release = job.release
    return {
        "release": release.version,
        "driver": release.driver,
        "image": release.image,
        "device": job.device.title,
        "sm": str(job.device.sm),
        "recipe": job.recipe,
    }
