"""How many replicas the load wants. Pure.

Up at once, beyond a tolerance; down, and to none at all, when fewer would have done for ``idle_s`` seconds: the number
is the largest that was wanted within them. So a load that comes and goes does not start and end replicas in turn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

TOLERANCE = 0.1
"""So far the load may exceed the target before there is one more; as the autoscaler of Kubernetes has it
(kubernetes.io/docs/tasks/run-application/horizontal-pod-autoscale, read 2026-11)."""


@dataclass(frozen=True)
class Load:
    """What clients ask for just now."""

    tokens: int = 0
    """Of prompts and answers so far, of all requests at work or waiting."""
    waiting: int = 0
    """Requests for which there is no replica."""
    idle_s: float = math.inf
    """Since a request was last at work; 0 while one is."""
    requests: int = 0
    """At work or waiting, for whatever."""
    room: int = 0
    """Requests that one replica takes at once; 0: not known."""

    def replicas(self, target_tokens: int) -> float:
        """How many of them it is enough for: by tokens, and so that each request has its place."""
        return max(self.tokens / target_tokens, self.requests / self.room if self.room else 0.0)


@dataclass(frozen=True)
class Scale:
    """The limits."""

    min: int
    max: int
    target_tokens: int
    """In flight for each replica."""
    idle_s: float


def desired(load: Load, scale: Scale, wanted: Mapping[int, float], now: float) -> tuple[int, dict[int, float]]:
    """``wanted``: number -> when so many were last wanted. -> how many there are to be, and the new ``wanted``."""
    recent = {number: when for number, when in wanted.items() if when + scale.idle_s > now}
    known = max(recent, default=0)
    enough_for = load.replicas(scale.target_tokens)
    number = math.ceil(enough_for)
    if known and number > known and enough_for <= known * (1 + TOLERANCE):
        number = known
    if load.waiting or load.tokens or load.requests:
        number = max(number, 1)
    number = min(number, scale.max)
    recent |= dict.fromkeys(range(1, number + 1), now)
    found = max(recent, default=0)
    if load.idle_s < scale.idle_s:
        found = max(found, 1)
    return max(scale.min, min(found, scale.max)), recent
