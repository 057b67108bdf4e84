"""Decides from outside whether a running server is still good: its processes, and one generated token now and then.

Policy, and why:

* A *dead* worker process is seen in /proc within half a second and confirmed by a probe, because Triton answers for it
  ("is not healthy", HTTP 400) while it calls itself ready. So death costs seconds, whatever the probe period is.
* A probe that *times out* may mean a hung engine or only a long prefill on a slow machine. Requests in flight leave no
  trace in Triton's own statistics until they end (2.51: ``response_stats`` stays empty for Python models), but work
  costs CPU time. A timeout during which the server's processes used the CPU therefore counts against a much longer
  limit.
* A probe is real work: one token. The period grows with what a probe costs, so that probing stays below 5 %.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from toolchain.servers.triton.probe import Verdict

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Policy:
    """When a server is probed, replaced and given up."""

    period_s: float = 5.0
    deadline_s: float = 20.0
    max_duty: float = 0.05
    """A probe that took t seconds is followed by a pause of at least t / max_duty."""
    failures: int = 2
    """Error answers or refused connections in a row."""
    timeouts: int = 3
    """Timeouts in a row without CPU use."""
    busy_cores: float = 0.2
    """CPU seconds per second from which a server that does not answer counts as working."""
    busy_limit_s: float = 300.0
    """How long a working server may leave probes unanswered."""
    tick_s: float = 0.5
    max_restarts: int = 5
    restart_window_s: float = 600.0
    backoff_s: float = 0.5
    """Before the first restart in the window; doubles with each further one."""


@dataclass
class Health:
    """The judgment over one server process; a new one for every start. ``probe`` asks for one token by a deadline."""

    policy: Policy
    session: int
    probe: Callable[[float], Verdict | None]
    clock: Callable[[], float] = time.monotonic
    _members: set[int] = field(default_factory=set)
    _next_probe_s: float = 0.0
    _failures: int = 0
    _timeouts: int = 0
    _unanswered_since_s: float | None = None

    def __post_init__(self) -> None:
        self._members = set(members(self.session))
        self._next_probe_s = self.clock() + self.policy.period_s

    def trouble(self) -> str | None:
        """Looks once; the reason to replace the server, or None."""
        lost = {pid for pid in self._members if not _lives(pid)}
        if not lost and self.clock() < self._next_probe_s:
            return None
        before, begun = members(self.session), self.clock()
        verdict = self.probe(self.policy.deadline_s)
        after = members(self.session)
        self._members = set(after)
        if verdict is None:  # interrupted: somebody else decides
            return None
        used_s = sum(after.values()) - sum(used for pid, used in before.items() if pid in after)
        return self._judge(verdict, used_s / max(self.clock() - begun, 1e-3), bool(lost))

    def _judge(self, verdict: Verdict, cores: float, lost: bool) -> str | None:
        if verdict.alive:
            self._failures = self._timeouts = 0
            self._unanswered_since_s = None
            self._next_probe_s = self.clock() + max(self.policy.period_s, verdict.seconds / self.policy.max_duty)
            return None
        self._next_probe_s = self.clock()
        if verdict.state == "timeout":
            return self._judge_timeout(verdict, cores)
        self._failures += 1
        if lost or self._failures >= self.policy.failures:
            return verdict.detail
        return None

    def _judge_timeout(self, verdict: Verdict, cores: float) -> str | None:
        now = self.clock()
        if self._unanswered_since_s is None:
            self._unanswered_since_s = now - verdict.seconds
        if cores < self.policy.busy_cores:
            self._timeouts += 1
        unanswered_s = now - self._unanswered_since_s
        if self._timeouts >= self.policy.timeouts or unanswered_s >= self.policy.busy_limit_s:
            return f"no token for {unanswered_s:.0f} s"
        return None


def members(session: int) -> dict[int, float]:
    """The living processes of a session -> CPU seconds used so far (proc(5): session, utime + stime).

    Not of a process group: mpirun gives each of its ranks a group of its own, and all stay in the session.
    """
    found = {}
    with os.scandir("/proc") as entries:
        pids = [int(one.name) for one in entries if one.name.isdigit()]
    for pid in pids:
        fields = _stat(pid)
        if fields and int(fields[3]) == session:
            found[pid] = (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
    return found


def _lives(pid: int) -> bool:
    return bool(_stat(pid))


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; empty for a process that is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].decode().split()
    except OSError:
        return []
    return [] if fields[0] in "ZX" else fields
