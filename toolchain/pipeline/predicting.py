"""What the plan of an engine says of its speed, in a report's words. It measures nothing and draws nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from toolchain import family
from toolchain.checkpoint import read_json
from toolchain.engine import Engine
from toolchain.errors import ScalellmError
from toolchain.family import LlamaConfig
from toolchain.measuring.report import Predicted, Prediction
from toolchain.planning.forecast import Estimate
from toolchain.planning.plan import make_plan
from toolchain.recipe import parse_recipe
from toolchain.variant import for_device


def prediction_of(engine: Engine, recipe: Path) -> Prediction | None:
    """From the recipe that the engine was built with, and the shape of its model.

    None on a CPU, of which no plan estimates times, and where neither the engine nor a checkpoint beside it
    (``WORK/NAME/checkpoint``) tells the shape.
    """
    config = next(_configs(engine.path), None)
    if config is None:
        return None
    try:
        built = for_device(parse_recipe(engine.stamp.recipe, recipe), engine.passport.device)
        plan = make_plan(built, config)
    except ScalellmError:  # a recipe that this release reads no more, or one with a draft model
        return None
    if plan.latency is None:
        return None
    return Prediction(
        ttft=_told(plan.latency.ttft),
        itl=_told(plan.latency.itl),
        ttft_factor=1 + plan.latency.ttft_band.worst,
        itl_factor=1 + plan.latency.itl_band.worst,
    )


def _configs(engine: Path) -> Iterator[LlamaConfig]:
    """The model's own config.json: in an engine of the llmapi backend, or in a checkpoint beside it."""
    beside = [path for folder in engine.parents[:2] for path in sorted(folder.glob("checkpoint*/config.json"))]
    for path in (engine / "config.json", *beside):
        with suppress(ScalellmError):  # an engine's config.json can be TensorRT-LLM's
            yield family.read_config(read_json(path), str(path))


def _told(estimates: Iterable[Estimate]) -> tuple[Predicted, ...]:
    return tuple(
        Predicted(tokens=one.tokens, batch=one.batch, seconds=one.seconds, floor_s=one.floor_s) for one in estimates
    )
