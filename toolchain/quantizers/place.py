"""Where a quantizer computes, and how much memory it may take there.

What is made does not depend on it but for rounding: a GPU adds in another order. It knows no model and no method;
``budget`` says what a model needs.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from toolchain.errors import PlanError, RecipeError
from toolchain.units import format_bytes

if TYPE_CHECKING:
    import torch

_MOST_THREADS = 16
_SHAPE = re.compile(r"auto|cpu|cuda(:\d+)?")


@dataclass(frozen=True)
class Place:
    """What the flags ``--quantize-on``, ``--max-ram`` and ``--max-vram`` say."""

    device: str = "cpu"
    """``"cpu"``, ``"cuda"``, ``"cuda:1"``, or ``"auto"``: the first GPU if torch sees one, else the CPU."""
    max_ram: int | None = None
    """Bytes of anonymous memory that this process may take; None: no limit."""
    max_vram: int | None = None
    """Bytes of the GPU's memory that torch may take; None: all of it."""

    def __post_init__(self) -> None:
        if not _SHAPE.fullmatch(self.device):
            raise RecipeError(f"--quantize-on {self.device}: there are auto, cpu, cuda and cuda:N")


ON_CPU = Place()


def open_device(place: Place) -> torch.device:
    """The device, its memory limited. PlanError where torch sees no such GPU or it is smaller than ``max_vram``."""
    import torch

    name = place.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cpu":
        return device
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (device.index or 0) >= count:
        found = f"{count} GPU{'s' * (count > 1)}" if count else "no GPU"
        raise PlanError(
            f"--quantize-on {place.device}: torch {torch.__version__} sees {found} on this machine",
            hint="Use --quantize-on cpu, or a build of torch with CUDA: https://pytorch.org/get-started/locally",
        )
    device = torch.device("cuda", device.index or 0)
    if place.max_vram is not None:
        whole = torch.cuda.get_device_properties(device).total_memory
        if place.max_vram > whole:
            raise PlanError(
                f"--max-vram {format_bytes(place.max_vram)}: {device} has {format_bytes(whole)}",
                hint=f"--max-vram {whole // 2**20}MiB, or leave the flag out",
            )
        torch.cuda.set_per_process_memory_fraction(place.max_vram / whole, device)
    return device


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turn torch's two ways of saying that memory ran out into a PlanError."""
    try:
        yield
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, of a GPU
            raise PlanError(
                f"the GPU's memory ran out: {str(error).splitlines()[0]}",
                hint="Finished layers are kept: close other programs on the GPU and run the same command again.\n"
                "Or say how much may be used: --max-vram 8GiB; or begin again with --quantize-on cpu.",
            ) from error
        if "can't allocate memory" not in str(error):
            raise
        raise PlanError(
            f"this machine's memory ran out: {str(error).splitlines()[0]}",
            hint="Finished layers are kept: close other programs and run the same command again, "
            "or say how much may be used: --max-ram 4GiB",
        ) from error


def usable_cores() -> int:
    """The cores that this process may use, as far as it pays to use them."""
    return min(len(os.sched_getaffinity(0)), _MOST_THREADS)


def resident() -> int | None:
    """Bytes of anonymous memory that this process holds now; None where the system has no /proc."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))
    except (OSError, StopIteration):
        return None


def give_back() -> None:
    """Return freed memory to the system, as glibc does by itself only for large blocks. Does nothing elsewhere."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):  # another C library
        return
