"""The draft model of a job with speculative decoding: its model, its recipe, and whether it fits."""

from __future__ import annotations

from pathlib import Path

from toolchain.errors import PlanError
from toolchain.pipeline.source import Model
from toolchain.planning.plan import Plan
from toolchain.planning.speculation import BACKENDS, draft_recipe
from toolchain.progress import Progress
from toolchain.recipe import Recipe
from toolchain.vocabulary import difference


def open_model(recipe: Recipe, folder: Path, progress: Progress) -> Model | None:
    """The draft model behind a recipe, whose artifacts lie in ``folder/draft``.

    None without one, and for a backend that the plan will refuse: nothing is downloaded for that.
    """
    if recipe.speculative is None or recipe.speculative.draft is None or recipe.chosen_backend not in BACKENDS:
        return None
    return Model(recipe.speculative.draft, folder / "draft" / "checkpoint", folder / "draft" / "imported", progress)


def recipe_of(plan: Plan) -> Recipe:
    """The draft model's own recipe."""
    assert plan.speculation is not None
    tokens, version = plan.max_kv_tokens, plan.release.version if plan.release else None
    return draft_recipe(plan.recipe, plan.speculation, plan.limits, kv_tokens=tokens, release=version)


def check_tokenizers(recipe: Recipe, model: Path | None, draft: Path | None) -> None:
    """Raise PlanError where the two folders mean different things by a token id. Folders that are not here pass."""
    assert recipe.speculative is not None
    different = difference(model, draft) if model and draft else ""
    if different:
        raise PlanError(
            f"{recipe.name}: the tokenizer of speculative.draft {recipe.speculative.draft} is another: {different}",
            hint="Use a smaller model of the same family, or leave out speculative",
        )
