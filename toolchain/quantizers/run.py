"""One run of quantize: the model, the draft, the device and the chunks it is computed in, and what is done already.

Sums in floating point depend on the device and on how many rows go through a product at once, so the journal remembers
both, and only work that was done in the same way is continued. It computes nothing and writes nothing but the journal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from toolchain import family, workspace
from toolchain.checkpoint import Checkpoint
from toolchain.progress import Progress
from toolchain.quantizers import budget
from toolchain.quantizers.layout import Scheme
from toolchain.quantizers.place import Place, open_device, resident, usable_cores

if TYPE_CHECKING:
    import torch

    from toolchain.quantizers.calibration import Calibration
    from toolchain.quantizers.samples import Samples
    from toolchain.quantizers.source import Source


@dataclass
class Run:
    """What one run works with, and how: the parts that all of its steps need."""

    checkpoint: Checkpoint
    draft: workspace.Draft
    scheme: Scheme
    samples: Samples | None
    progress: Progress
    device: torch.device | None
    """None where nothing is computed."""
    how: dict[str, Any]
    """``device``: its kind, and with samples ``chunk_tokens``: what the bits depend on beside the inputs."""
    journal: list[dict[str, Any]]
    """What earlier runs finished in the same way."""

    @classmethod
    def begin(
        cls,
        checkpoint: Checkpoint,
        draft: workspace.Draft,
        scheme: Scheme,
        samples: Samples | None,
        progress: Progress,
        place: Place,
        *,
        quantizes: bool,
    ) -> Run:
        """Open the device, see what memory is needed and what an earlier run left. Raises PlanError."""
        if not quantizes and samples is None:
            return cls(checkpoint, draft, scheme, None, progress, None, {}, [])
        device = open_device(place)
        work = _work(checkpoint, scheme, samples, on_gpu=device.type != "cpu", quantizes=quantizes)
        journal = [{**_FIRST_HOW, **entry} for entry in draft.journal()]
        recorded = journal[-1]["chunk_tokens"] if journal else None
        limits = {"max_ram": place.max_ram, "max_vram": place.max_vram if work.on_gpu else None}
        chunk = budget.choose_chunk(work, **limits, base=resident(), recorded=recorded)
        how = {"device": device.type, "chunk_tokens": chunk} if samples else {"device": device.type}
        same = [entry for entry in journal if all(entry[key] == value for key, value in how.items())]
        if journal and not same:
            before, now = (_spoken(one) for one in (journal[-1], how))
            progress.note(f"quantize: begins again: what is there was computed {before}, and this run is {now}")
        return cls(checkpoint, draft, scheme, samples, progress, device, how, same)

    @cached_property
    def source(self) -> Source:
        from toolchain.quantizers.source import CPU, Source

        return Source(self.checkpoint, self.device or CPU)

    def record(self, entry: Mapping[str, Any]) -> None:
        self.draft.record({**entry, **self.how})

    def calibration(self) -> Calibration | None:
        from toolchain.quantizers.calibration import Calibration

        if self.samples is None:
            return None
        chunk_tokens, compute = self.how["chunk_tokens"], self.scheme.compute
        return Calibration(self.source, self.samples, self.draft.path, chunk_tokens, compute)


_FIRST_HOW = {"device": "cpu", "chunk_tokens": budget.MOST_TOKENS}
"""What journals stand for that do not say it."""


def _spoken(how: Mapping[str, Any]) -> str:
    chunk = f", {how['chunk_tokens']} tokens at once" if "chunk_tokens" in how else ""
    return f"on {how['device']}{chunk}"


def _work(
    checkpoint: Checkpoint, scheme: Scheme, samples: Samples | None, *, on_gpu: bool, quantizes: bool
) -> budget.Work:
    """What the run's memory depends on."""
    from toolchain.quantizers.calibration import compute_dtype
    from toolchain.quantizers.source import DTYPES

    config = checkpoint.config
    stored = DTYPES[checkpoint.tensors[f"{family.linear_name(0, family.LINEARS[0])}.weight"].dtype]
    embedded = DTYPES[checkpoint.tensors["model.embed_tokens.weight"].dtype]
    rows, tokens = samples.token_ids.shape if samples else (0, 0)
    return budget.Work(
        config,
        scheme,
        stored.itemsize,
        copied=stored != compute_dtype(embedded, scheme.compute),
        rows=rows,
        row_tokens=tokens,
        threads=usable_cores(),
        on_gpu=on_gpu,
        quantizes=quantizes,
    )
