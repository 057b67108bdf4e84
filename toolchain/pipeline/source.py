"""The model behind a job: where its configuration, its fingerprint and its weights come from."""

from __future__ import annotations

from pathlib import Path

from toolchain import __version__, workspace
from toolchain import checkpoint as checkpoints
from toolchain.checkpoint import Checkpoint
from toolchain.errors import ArtifactError
from toolchain.family import LlamaConfig, published, read_config
from toolchain.pipeline.state import State, state_of
from toolchain.planning.plan import Plan
from toolchain.progress import Progress
from toolchain.quantization import WEIGHTS, weights_of
from toolchain.quantizers import foreign
from toolchain.quantizers.foreign import Foreign
from toolchain.quantizers.layout import HF_QUANT_CONFIG
from toolchain.recipe import Quantization, Recipe
from toolchain.stages import adopt as adopt_stage
from toolchain.workspace import Stamp

_NAME_A_MODEL = "Give the folder of a Hugging Face model: --model DIR"


class Model:
    """The model behind a job, opened only as far as is needed.

    ``config`` comes from the model's folder; where that is not on this machine, from a quantized checkpoint that was
    brought along, else from what is published of a model of that name. ``opened`` fetches the model if it must, and
    imports one that another tool wrote into ``WORK/RECIPE/imported`` first.
    """

    def __init__(self, source: str, quantized: Path, imported: Path, progress: Progress) -> None:
        self._source = source
        self._quantized = quantized
        self._imported = imported
        self._progress = progress
        self._opened: Checkpoint | None = None
        self._stamp: Stamp | None = None
        found = checkpoints.find(source)
        if found is None:
            self._stamp = workspace.current(self._quantized)
        if found is None and self._stamp is None and published(source) is None:
            found = checkpoints.download(source)
        self.folder = found or (self._quantized if self._stamp else None)
        """Where the model, or else its quantized checkpoint, lies on this machine (GGUF: a file); None: nowhere."""
        self._foreign = foreign.open_foreign(found) if found else None
        self.config: LlamaConfig = self._foreign.config if self._foreign else self._config(found)

    def check(self, plan: Plan) -> None:
        """Raises PlanError where the weights of a foreign model are not those that the recipe asks for."""
        if self._foreign:
            adopt_stage.check(
                Path(self._source),
                self._foreign,
                weights=plan.weights.name,
                group_size=plan.group_size,
                static_inputs=plan.backend != "openvino",
            )

    def _config(self, folder: Path | None) -> LlamaConfig:
        folder = folder or (self._quantized if self._stamp else None)
        known = None if folder else published(self._source)
        if known is not None:
            return known
        file = (folder or checkpoints.download(self._source)) / "config.json"
        return read_config(checkpoints.read_json(file, hint=_NAME_A_MODEL), str(file))

    @property
    def quantized(self) -> Quantization | None:
        """What a recipe says of weights that are quantized already, by whichever tool; None for those that are not."""
        if self._foreign:
            scheme = self._foreign.scheme
            return _said(scheme.weights, scheme.group_size) if scheme else None
        if self._stamp is not None or self.folder is None or not (self.folder / HF_QUANT_CONFIG).is_file():
            return None
        found = Checkpoint.open(self.folder).quantization
        weights = weights_of(found.quant_algo) if found else None
        return _said(weights.name, found.group_size) if found and weights and weights.quant_algo else None

    @property
    def fingerprint(self) -> str | None:
        """Of the model's files; from the checkpoint's stamp where the model is not here; None where neither is."""
        if self._stamp is not None:
            return str(self._stamp.inputs["model"])
        if self._foreign is not None:
            return workspace.key_of(adopt_stage.inputs(self._foreign))
        return self.opened().fingerprint if self._opened or checkpoints.find(self._source) else None

    def calibration_digest(self, data: str) -> str | None:
        """Of the text that the checkpoint which was brought along was calibrated on, if that was ``data``."""
        known = self._stamp.inputs.get("calibration") if self._stamp else None
        return str(known["digest"]) if known and known["data"] == data and known["digest"] else None

    def opened(self) -> Checkpoint:
        """The checked model, downloaded if need be."""
        if self._stamp is not None:
            raise ArtifactError(
                f"{self._quantized}: must be made again, and the model it was made from is not on this machine",
                hint=_NAME_A_MODEL,
            )
        if self._opened is None and self._foreign is not None:
            import_model(self._foreign, self._imported, self._progress)
            self._opened = Checkpoint.open(self._imported)
        elif self._opened is None:
            self._opened = Checkpoint.open(checkpoints.download(self._source))
        return self._opened


def _said(weights: str, group_size: int | None) -> Quantization:
    group = {"group_size": group_size} if WEIGHTS[weights].group_sizes and group_size else {}
    return Quantization.model_validate({"weights": weights, **group})


def look(recipe: Recipe, work: Path, progress: Progress) -> tuple[Model, LlamaConfig | None]:
    """The model behind a recipe, and its draft model's configuration, to plan with: nothing is made or imported."""
    folder = work / recipe.name
    model = Model(recipe.model, folder / "checkpoint", folder / "imported", progress)
    if recipe.speculative is None or recipe.speculative.draft is None:
        return model, None
    draft = folder / "draft"
    return model, Model(recipe.speculative.draft, draft / "checkpoint", draft / "imported", progress).config


def import_model(model: Foreign, target: Path, progress: Progress, tokenizer: Path | None = None) -> State:
    """A foreign model as a stamped checkpoint in ``target``, made unless it is there. -> its state before.

    Raises ArtifactError where ``target`` is a folder of something else.
    """
    inputs = adopt_stage.inputs(model, tokenizer)
    state = state_of("imported", target, inputs)
    if state.fresh:
        return state
    stamp = workspace.read_stamp(target)
    if (
        target.exists()
        and not (target.is_dir() and not any(target.iterdir()))
        and (not stamp or stamp.stage != "imported")
    ):
        raise ArtifactError(
            f"{target}: exists and is no import of scalellm's", hint="Name a folder that is not there yet."
        )
    with workspace.draft(target, "imported", inputs) as draft:
        adopt_stage.adopt(model, draft, progress=progress, tokenizer=tokenizer)
        draft.commit(versions={"scalellm": __version__}, recipe="")
    return state
