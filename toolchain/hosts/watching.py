"""Runs the commands of a build, shows how far they are, and says in a person's words why one failed.

All output goes to the job's log, which becomes ``build-failed.log`` when a command fails; the next build begins anew.
"""

from __future__ import annotations

import os
import re
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from toolchain import runner
from toolchain.errors import ToolError
from toolchain.host import EngineJob
from toolchain.hosts.causes import diagnose
from toolchain.progress import Progress, Task

FAILED = "build-failed.log"
_TAIL_LINES = 20
_DIAGNOSED_LINES = 2000

_MILESTONES = (
    (re.compile(r"Build TensorRT engine"), "TensorRT compiles"),
    (re.compile(r"Engine generation completed"), "compiled"),
    (re.compile(r"Serializing engine to"), "writing the engine"),
)
"""What every rank says once: logs of 0.12 to 0.20 in https://github.com/NVIDIA/TensorRT-LLM/issues/2451,
https://github.com/k2-fsa/sherpa/issues/605 and https://github.com/NVIDIA/TensorRT-LLM/pull/4375 (2026-11-22)."""


_TRANSFERRED = re.compile(r"\s*([\d.,]+)\s+\d+%")
"""Bytes so far and percent, rsync(1), --info=progress2."""


@dataclass
class _Steps:
    """How far the builder is, from its log."""

    task: Task
    left: int

    def read(self, line: str) -> None:
        for pattern, text in _MILESTONES:
            if pattern.search(line):
                self.task.describe(text)
                if self.left:
                    self.left -= 1
                    self.task.advance(1)


def build(
    argv: Sequence[str],
    job: EngineJob,
    log: Path,
    progress: Progress,
    *,
    on: str,
    afterwards: Sequence[str] = (),
) -> int:
    """Run the command that builds, with a bar -> its exit code. ``afterwards`` is run whichever way it ends."""
    total = len(_MILESTONES) * job.gpus
    with progress.task(f"build: trtllm-build on {on}", total, "steps") as task, tempfile.TemporaryDirectory() as empty:
        steps = _Steps(task, total)  # the builder leaves its timing cache in its working folder
        with runner.start(argv, log=log, env=os.environ, cwd=Path(empty), afterwards=afterwards) as process:
            code = process.follow(steps.read)
        if code == 0:
            task.advance(steps.left)
    return code


def transfer(argv: Sequence[str], nbytes: int, log: Path, progress: Progress, label: str) -> int:
    """Run an rsync with ``--info=progress2`` and a bar -> its exit code; what it says when it fails goes to the log."""
    with tempfile.TemporaryDirectory() as folder, progress.task(f"build: {label}", nbytes, "bytes") as task:
        said, sent = Path(folder) / "log", 0

        def read(line: str) -> None:
            nonlocal sent
            found = _TRANSFERRED.match(line)
            if found:
                now = min(nbytes, int(re.sub(r"\D", "", found[1])))
                task.advance(now - sent)
                sent = now

        with runner.start(argv, log=said, env=os.environ, hint="sudo apt-get install rsync") as process:
            code = process.follow(read)
        if code == 0:
            task.advance(nbytes - sent)
        else:
            words = [line for line in said.read_text(errors="replace").splitlines() if not _TRANSFERRED.match(line)]
            append(log, "\n".join(words))
    return code


def append(log: Path, text: str) -> None:
    """Add to the log what a short command said."""
    with log.open("a", encoding="utf-8") as stream:
        stream.write(f"{text.rstrip()}\n" if text.strip() else "")


def failure(argv: Sequence[str], code: int, job: EngineJob, log: Path, *, what: str, hint: str = "") -> ToolError:
    """The error for a command that failed: its last words, the likely cause and what to do. Keeps the log aside."""
    kept = log.with_name(FAILED)
    log.replace(kept)
    last = runner.tail(kept, _TAIL_LINES)
    how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
    lines = [f"{job.recipe}: {what} {how}", *([last] if last else [])]
    cause = diagnose(runner.tail(kept, _DIAGNOSED_LINES), code, job)
    if cause:
        lines.append(f"Likely cause: {cause.message} ({cause.source})")
    advice = [*(cause.advice if cause else ()), *([hint] if hint else []), f"less {shlex.quote(str(kept))}   # its log"]
    return ToolError("\n".join(lines), hint="\n".join(advice))


def fresh(log: Path) -> None:
    """Begin a new log: what an earlier build said explains nothing now."""
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_bytes(b"")
