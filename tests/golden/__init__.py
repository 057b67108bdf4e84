"""What a shipped recipe becomes with a pinned TensorRT-LLM release, as text: for eyes, and for tests to compare.

    python -m tests.golden        # writes the files beside this one anew: read the diff before you commit it

``RECIPE/RELEASE.txt`` holds the builder's command, the checkpoint's ``config.json`` and the Triton repository, or the
plan's refusal. A config.pbtxt, or its tensors, that several repositories share stands once, in ``models``.
``plans/RECIPE.txt`` is the plan of a shipped recipe, or of one of ``VARIED``, with its own release; ``choice.txt`` a
table of ``scalellm plan --goal``.

The model is Llama-2-13B by its published config; the engine is what ``tests/fake_build.py`` leaves.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.fake_build import engine_config
from toolchain import workspace
from toolchain.backends.tensorrt_llm.document import config_document
from toolchain.backends.tensorrt_llm.export import Export
from toolchain.backends.tensorrt_llm.split import Split
from toolchain.checkpoint import Checkpoint, CheckpointQuantization, TensorInfo
from toolchain.engine import Engine, write_passport
from toolchain.errors import PlanError
from toolchain.family import LlamaConfig, published
from toolchain.planning import build_peaks
from toolchain.planning.build_flags import command
from toolchain.planning.choice import choose
from toolchain.planning.choice_table import sheet
from toolchain.planning.load import Load, Slo
from toolchain.planning.option import Asked
from toolchain.planning.plan import Plan, make_plan
from toolchain.planning.price_list import PriceList
from toolchain.recipe import available, load_recipe, parse_recipe
from toolchain.stages import build, package
from toolchain.stages.commands import paste
from toolchain.variant import for_device

HERE = Path(__file__).parent
RELEASES = ["0.12.0", "0.13.0", "0.16.0", "0.17.0", "0.18.2", "0.19.0", "0.20.0", "0.21.0", "1.0.0", "1.1.0", "1.2.1"]
MODEL = "meta-llama/Llama-2-13b-chat-hf"


VARIED = {
    "with-draft": "device: a100-80gb\nspeculative: {draft: TinyLlama/TinyLlama-1.1B-Chat-v1.0, tokens: 4}\n"
    "limits: {max_batch_size: 8, max_seq_len: 2048}\n",
    "with-window": "device: rtx4090\ntensorrt_llm: 0.16.0\nquantization: {weights: int4, method: awq}\n"
    "kv_cache: {window: 1024, sinks: 4}\nlimits: {max_batch_size: 8, max_seq_len: 4096, max_input_len: 3072}\n",
    "with-llmapi": "device: h100\nbackend: tensorrt_llmapi\nquantization: {weights: fp8}\nkv_cache: {dtype: fp8}\n"
    "services: 2\nreserve: 2GiB\nlimits: {max_batch_size: 16, max_seq_len: 4096}\n",
}
"""Recipes beside the shipped ones, for what none of them has: a draft model, a window, the llmapi runtime."""


def recipes() -> list[str]:
    """The shipped recipes, and each device of those that are for several: ``llama2-13b@t4``."""
    shipped = workspace.shipped("recipes")
    names = sorted(available([shipped]))
    devices = [f"{name}@{device}" for name in names for device in load_recipe(name, search=[shipped]).per_device]
    return names + devices


def planned(name: str, release: str | None) -> Plan:
    """The plan of ``recipe`` or ``recipe@device`` with that release, or the recipe's own. Raises PlanError."""
    if name in VARIED:
        draft = published("TinyLlama/TinyLlama-1.1B-Chat-v1.0") if "draft:" in VARIED[name] else None
        return make_plan(parse_recipe(f"model: {MODEL}\n{VARIED[name]}", Path(f"{name}.yaml")), _config(), draft=draft)
    stem, _, device = name.partition("@")
    recipe = load_recipe(stem, search=[workspace.shipped("recipes")])
    recipe = for_device(recipe, device or recipe.device)
    changes = {"model": MODEL} | ({"tensorrt_llm": release} if release else {})
    return make_plan(recipe.model_copy(update=changes), _config())


def plan_text(name: str) -> str:
    """Every decision with its reason and source, each term of the memory, the estimates and the warnings."""
    plan = planned(name, None)
    lines = [f"{one.name} = {one.value}: {one.explained}" for one in plan.decisions]
    memory = [f"{one.name}: {one.bytes} B ({one.how})" for one in plan.memory.lines]
    held = (
        f"total: {plan.memory.total} B; {plan.memory.free_bytes} B free; {plan.memory.sequences_at_full_length} at once"
    )
    peaks = [f"{one.stage} {one.resource}: {one.bytes} B ({one.how}; {one.source})" for one in build_peaks.peaks(plan)]
    speed = plan.latency
    told = (
        [f"TTFT of {one.tokens}: {one.seconds * 1e3:.1f} ms ({one.floor_s * 1e3:.1f})" for one in speed.ttft]
        if speed
        else []
    )
    told += (
        [f"ITL of {one.batch}: {one.seconds * 1e3:.2f} ms ({one.floor_s * 1e3:.2f})" for one in speed.itl]
        if speed
        else []
    )
    warned = [f"note: {one}" for one in plan.warnings]
    return "\n".join([*lines, "", *memory, held, "", *peaks, "", *told, *warned, ""])


def _config() -> LlamaConfig:
    known = published(MODEL)
    assert known is not None
    return known


def text(name: str, release: str) -> tuple[str, dict[str, str]]:
    """The golden text, and the shared files that it names -> their text."""
    try:
        plan = planned(name, release)
    except PlanError as error:
        return f"refused: {error.message}\ntry: {error.hint}\n", {}
    checkpoint, document = _checkpoint(plan)
    argv = command(plan, Path("CHECKPOINT"), Path("ENGINE"))
    parts = [("trtllm-build", paste(argv)), ("config.json of the checkpoint", json.dumps(document, indent=2))]
    files, shared = _repository(plan, checkpoint, engine_config(argv, document, release))
    body = "".join(f"== {title}\n{one.rstrip()}\n\n" for title, one in [*parts, *files])
    return body.rstrip() + "\n", shared


def _checkpoint(plan: Plan) -> tuple[Checkpoint, dict[str, Any]]:
    """A quantized checkpoint without bytes, as the quantizers name its tensors, and its config.json for the builder."""
    algo = plan.weights.quant_algo
    names = [f"model.layers.{layer}.self_attn.o_proj.pre_quant_scale" for layer in range(plan.config.num_layers)]
    smoothed = plan.weights.name == "int4" and plan.recipe.quantization.method == "awq"
    info = {one: TensorInfo(one, "F16", (plan.config.hidden_size,), Path("none"), 0, 0) for one in names if smoothed}
    quantization = CheckpointQuantization(algo, None, plan.group_size) if algo else None
    checkpoint = Checkpoint(Path("none"), plan.config, info, quantization)
    document = config_document(Export(checkpoint, Split(plan.tp, plan.pp), plan.kv.name))
    document["producer"]["version"] = "VERSION"
    return checkpoint, document


def _repository(
    plan: Plan, checkpoint: Checkpoint, config: dict[str, Any]
) -> tuple[list[tuple[str, str]], dict[str, str]]:
    shared: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        with workspace.draft(Path(folder) / "checkpoint", "checkpoint", {"model": "MODEL"}) as draft:
            source = draft.commit(versions={}, recipe="")
        with workspace.draft(Path(folder) / "engine", "engine", {}) as draft:
            (draft.path / "config.json").write_text(json.dumps(config))
            (draft.path / "tokenizer.json").write_text("{}")
            for rank in range(plan.tp * plan.pp):
                (draft.path / f"rank{rank}.engine").write_bytes(b"engine")
            write_passport(draft.path, build.passport(plan, checkpoint, source))
            draft.commit(versions={}, recipe="")
        out = Path(folder) / "repository"
        package.package(Engine.open(Path(folder) / "engine"), out, services=plan.services)
        found = [("files", "\n".join(sorted(str(file.relative_to(out)) for file in out.rglob("*") if file.is_file())))]
        for file in sorted(out.glob("*/config.pbtxt")):
            model, body = file.parent.name, file.read_text(encoding="utf-8")
            start, stop = 0, len(body)
            if model == package.ENGINE_MODEL:  # its tensors are those of the release, the rest is the recipe's
                start, stop = body.index("input ["), body.index("parameters {")
            name = f"models/{model}-{hashlib.sha256(body[start:stop].encode()).hexdigest()[:10]}.pbtxt"
            shared[name] = body[start:stop]
            found.append((f"{model}/config.pbtxt", f"{body[:start]}... {name}\n{body[stop:]}"))
        found.append(("repository.json", (out / package.CONTENTS).read_text(encoding="utf-8")))
    return found, shared


def everything() -> Iterator[tuple[str, str]]:
    """(file in this folder, text) of all of them; shared files once."""
    told: set[str] = set()
    for name in VARIED:
        yield f"plans/{name}.txt", plan_text(name)
    for name in recipes():
        yield f"plans/{name}.txt", plan_text(name)
        for release in RELEASES:
            body, shared = text(name, release)
            yield f"{name}/{release}.txt", body
            for file in shared.keys() - told:
                told.add(file)
                yield file, shared[file]


def choice_text() -> str:
    """The table of four devices for the blog's model, at a day and with public prices, a line a row."""
    recipe = load_recipe("llama2-13b", search=[workspace.shipped("recipes")])
    asked = Asked(recipe.model_copy(update={"model": MODEL}), _config(), Load(1024, 256), Slo(1.0, 0.08))
    made = choose(asked, ["rtx4090", "l4", "t4", "a100-80gb"], "cost", datetime.date(2026, 11, 22))
    drawn = sheet(made, PriceList())
    rows = [drawn.columns, *drawn.rows]
    return "\n".join([drawn.title, *(" | ".join(row) for row in rows), "", *drawn.notes, ""])
