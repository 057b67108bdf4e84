"""The recipe: one YAML file that says what is served, on which device, and how it is quantized.

Holds the strict model of a recipe, its JSON Schema, the way a recipe is found by name, and what its keys exclude
together. It decides nothing: what a recipe leaves open, ``plan`` fills in, with reasons.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PrivateAttr
from pydantic_core import PydanticCustomError

from toolchain import workspace
from toolchain.device import closest_device, devices, find_device
from toolchain.errors import RecipeError
from toolchain.problems import Count, Few, MarkedYaml, Name, Port, Section, Text, has_keys, not_a_choice, read_text
from toolchain.quantization import WEIGHTS
from toolchain.release import releases, without_engine
from toolchain.units import parse_bytes

SUFFIXES = (".yaml", ".yml")
SCHEMA_FILE = "recipe.schema.json"
CALIBRATION_FILES = (".jsonl", ".txt", ".parquet")
"""What ``calibration.data`` may end in when it names a file."""


def _known_device(name: str) -> str:
    found = find_device(name)
    if found is None:
        raise not_a_choice(name, "device", devices(), closest_device(name))
    return found.name


def _known_release(version: str) -> str:
    if version not in releases() and not without_engine(version):  # the plan says what became of those
        near = get_close_matches(version, list(releases()), n=1)
        raise not_a_choice(version, "release", releases(), near[0] if near else "")
    return version


def _size(text: str) -> str:
    try:
        count = parse_bytes(text)
    except (ValueError, OverflowError):
        count = 0
    if not 0 < count < 2**63:
        raise PydanticCustomError("size", "{value} is not a size; write it as 2GiB or 512MiB", {"value": repr(text)})
    return text


def _calibration_data(text: str) -> str:
    named = text == "builtin" or (text.startswith("hf:") and len(text) > 3)
    if not named and not text.lower().endswith(CALIBRATION_FILES):
        listed = f"builtin, hf:ORG/NAME or a file that ends in {', '.join(CALIBRATION_FILES)}"
        raise PydanticCustomError("data", "{value} is not one of " + listed, {"value": repr(text)})
    return text


def _true_or_false(value: Any) -> bool:
    if not isinstance(value, bool):
        raise PydanticCustomError("switch", "must be true or false, not {value}", {"value": repr(value)[:60]})
    return value


Switch = Annotated[bool, BeforeValidator(_true_or_false)]


def _offer_devices(schema: dict[str, Any]) -> None:
    """Names complete in an editor; aliases such as "RTX 4090" are accepted too."""
    aliases = {alias for one in devices().values() for alias in one.aliases}
    schema["anyOf"] = [{"enum": list(devices())}, {"enum": sorted(aliases - set(devices()))}]


def _offer_releases(schema: dict[str, Any]) -> None:
    schema["examples"] = list(releases())[::-1]


class Quantization(Section):
    """How the linear layers' weights are stored. Embeddings, norms and head keep the model's own dtype."""

    weights: Literal["none", "auto", "fp8", "int4", "int8", "int8_sq", "int4_fp8"] = Field(
        default="none",
        description="none: as they are. auto: fp8 where the device multiplies it, else int4 by awq. "
        "fp8: e4m3, one scale per matrix; needs SM 8.9 or newer. "
        "int4: symmetric, one scale per group of input channels, 16-bit activations (W4A16). "
        "int8: symmetric, one scale per output channel, 16-bit activations (W8A16). "
        "int8_sq: SmoothQuant, int8 weights and activations (W8A8); calibrated; needs SM 8.0 or newer. "
        "int4_fp8: int4 weights by AWQ and fp8 activations (W4A8); calibrated; needs SM 8.9 or newer.",
    )
    group_size: Literal[32, 64, 128] = Field(
        default=128,
        description="Input channels that share one scale; only with int4, and int4_fp8, which takes 128. "
        "32 only with the openvino backend.",
    )
    scales: Literal["modelopt", "mse"] = Field(
        default="mse",
        description="How int4 scales are chosen; only with int4 or int4_fp8. modelopt: amax / 7, as NVIDIA ModelOpt "
        "does. mse: the clipping of that range with the least squared error.",
    )
    method: Literal["rtn", "awq", "gptq"] = Field(
        default="rtn",
        description="How int4 weights are rounded; only with int4. rtn: each to its nearest value, no calibration. "
        "awq: input channels that matter are scaled up first. gptq: each rounding error is made up for by the weights "
        "that are not rounded yet. awq and gptq are calibrated.",
    )
    clip: Switch = Field(
        default=False,
        description="Search the clipping of each group by the layer's output; only with method awq or int4_fp8.",
    )
    fp8_scales: Literal["shared", "separate"] = Field(
        default="shared",
        description="Only with fp8. shared: q, k and v have one weight scale, gate and up another, as TensorRT-LLM's "
        "fused matrices need. separate: one per matrix, as NVIDIA ModelOpt's unified export writes them.",
    )
    smoothquant_alpha: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.5,
        description="Only with int8_sq: how much of the activations' outliers the weights take over, from 0 (none) "
        "to 1 (all, as NVIDIA ModelOpt does by default).",
    )
    propagate: Literal["clean", "quantized"] = Field(
        default="clean",
        description="What the next layer is calibrated on; not with none. clean: the outputs of the layers as "
        "they were, as NVIDIA ModelOpt does. quantized: those of the quantized layers.",
    )


class Calibration(Section):
    """The text on which ranges of activations are measured. Read only where something needs it: method awq or gptq,
    weights int8_sq or int4_fp8, and in TensorRT-LLM engines fp8 weights and int8 or fp8 caches."""

    data: Annotated[Text, AfterValidator(_calibration_data)] = Field(
        default="builtin",
        description="builtin: the English conversations that come with scalellm. Or a file: .jsonl (a line is "
        '{"messages": [{"role": ..., "content": ...}]} or {"text": ...}), .txt (paragraphs) or .parquet (a column '
        "messages or text), relative to the current folder; or hf:ORG/NAME, a data set of the hub.",
        examples=["builtin", "chats.jsonl", "hf:ORG/NAME"],
    )
    samples: Count = Field(default=64, description="Rows of text that run through the model.")
    tokens: Annotated[int, Field(ge=8, le=2**20)] = Field(default=256, description="Tokens in each row.")
    chat_template: Switch = Field(
        default=True, description="Write conversations as the model's chat template does, and not as plain text."
    )


class KvCache(Section):
    """How keys and values are kept between steps, and how many."""

    dtype: Literal["fp16", "auto", "int8", "fp8", "fp32"] = Field(
        default="fp16",
        description="auto: the smallest that the device and the backend have. "
        "fp16: 16 bits, the model's own dtype. int8: in TensorRT-LLM engines static, one scale per layer; "
        "with openvino it means the u8 cache, whose scales are made while running (per token for values, per "
        "channel and block of tokens for keys), so nothing is calibrated. fp8: needs SM 8.9 or newer. "
        "fp32: only with device cpu, for comparisons.",
    )
    max_tokens: Count | None = Field(
        default=None,
        description="Tokens that the cache of one service holds. Default: what the memory allows and the limits need.",
    )
    size: Annotated[str, AfterValidator(_size)] | None = Field(
        default=None,
        description="Bytes that the cache of one service may take, such as 2GiB; instead of max_tokens. With a draft "
        "model: its cache and the model's together.",
        examples=["2GiB", "512MiB"],
    )
    window: Count | None = Field(
        default=None,
        description="KV sparsification: each token attends to the last so many tokens only, sinks included. Prompts "
        "longer than that lose their beginning. Default: all tokens of the sequence.",
    )
    sinks: Annotated[int, Field(ge=0, le=1024)] = Field(
        default=0,
        description="The first tokens of a sequence that stay in the window for good (attention sinks, 4 as a rule); "
        "only with window. openvino keeps whole blocks of 32, and at least one.",
    )
    reuse: Switch = Field(
        default=True,
        description="Prefix cache: a prompt takes the keys and values of an earlier one with the same beginning. "
        "Not with window, nor where the engine has no paged-context attention.",
    )


class Speculative(Section):
    """Tokens are drafted cheaply, and the model itself checks them all in one step. The text stays the same."""

    draft: Text | None = Field(
        default=None,
        description="The draft model: a folder in the Hugging Face layout, or hf:ORG/NAME (ORG/NAME works too). It has "
        "the model's own tokenizer, and is quantized as the model is.",
        examples=["TinyLlama/TinyLlama-1.1B-Chat-v1.0"],
    )
    lookup: Annotated[int, Field(ge=1, le=16)] | None = Field(
        default=None,
        description="Prompt lookup instead of a draft model: where the last so many tokens, or fewer, stand earlier in "
        "the sequence, those that followed there are drafted. 3 as a rule. Only with the openvino backend.",
    )
    tokens: Annotated[int, Field(ge=1, le=32)] = Field(
        default=4, description="Tokens that are drafted for one step of the model, at most."
    )


class LoraAdapter(Section):
    """A LoRA adapter beside the model."""

    name: Name = Field(description="What requests call it: model MODEL:NAME; lora_task_id counts from 1.")
    path: Text = Field(
        description="A folder that peft has saved, with adapter_model.safetensors, relative to the current folder."
    )


class RecipeLimits(Section):
    """What the engine is made for."""

    max_batch_size: Count = Field(default=8, description="Sequences in flight at the same time, per service.")
    max_seq_len: Count | None = Field(
        default=None,
        description="Tokens of one sequence, prompt and output together. Default: all positions that the model knows.",
    )
    max_input_len: Count | None = Field(
        default=None,
        description="Tokens of the longest prompt. Default: max_seq_len (set it on a T4: it costs memory squared).",
    )
    max_num_tokens: Count | None = Field(
        default=None,
        description="Tokens in one step over all sequences; decides the activations' memory. "
        "Default: 8192 (256 on a cpu, which takes no more), or max_batch_size x max_seq_len where that is less.",
    )


class Parallel(Section):
    """Over how many GPUs one service is split."""

    tp: Few = Field(default=1, description="Tensor parallelism: GPUs that share each matrix.")
    pp: Few = Field(default=1, description="Pipeline parallelism: GPUs that share the layers.")


class Serve(Section):
    """Where the server listens. These say where, not what: changing them rebuilds nothing."""

    host: Text = Field(default="127.0.0.1", description="Address to bind; 0.0.0.0 opens the server to the network.")
    http_port: Port = Field(default=8000, description="KServe HTTP.")
    grpc_port: Port = Field(default=8001, description="KServe gRPC.")
    metrics_port: Port = Field(default=8002, description="Prometheus metrics.")


class Cpu(Section):
    """Settings of the openvino backend; only with device cpu."""

    threads: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        default=None, description="Threads of one service. Default: the machine's cores, shared by the services."
    )
    precision: Literal["auto", "f32", "bf16"] = Field(
        default="auto",
        description="Arithmetic of the engine. auto: bf16 where the CPU has instructions for it, else f32.",
    )
    activations: Literal["full", "int8"] = Field(
        default="full",
        description="What int4 and int8 layers multiply their weights with. full: the arithmetic's 16 or 32 bits, as "
        "W4A16 on a GPU does. int8: rounded at run time, one scale per group of a token's channels: prompts and tokens "
        "come faster, and the text is no longer the GPU's.",
    )


class Accept(Section):
    """How much quantization may change, and an engine may differ, before nobody is to be served by it.

    The defaults are ours: looser than what 4 bits cost a 7B or 13B model, and far from what a wrong scale does.
    """

    perplexity_ratio: Annotated[float, Field(ge=1, le=100)] = Field(
        default=1.1, description="Perplexity on held-out text, quantized over unquantized: at most this."
    )
    kl: Annotated[float, Field(gt=0, le=100)] = Field(
        default=0.1,
        description="KL divergence of the quantized model's next token from the unquantized one's, in nats a token: at "
        "most this.",
    )
    top1_agreement: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.85, description="Share of tokens where both find the same one the likeliest: at least this."
    )
    int8_kv_range: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.2,
        description="Of an int8 cache: the largest key or value that the text gives, over the largest that the scale "
        "can hold, in the worst layer: at least this. A scale far too large leaves few of 255 steps, which a small "
        "model's predictions hardly show.",
    )
    greedy_agreement: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.9,
        description="Of a running engine: share of the tokens that it gives where the checkpoint, computed on a CPU "
        "after the same tokens, would give the same one: at least this.",
    )

    def failures(self, measures: Mapping[str, Mapping[str, float | None]]) -> list[str]:
        """What does not pass, in words; ``measures``: by the name of a key here, ``{"value": ..., "error": ...}``.

        The number itself decides, not its error; a number that is none does not pass.
        """
        found = []
        for name, limit in self.model_dump().items():
            value = measures.get(name, {}).get("value", limit)
            most = name in ("perplexity_ratio", "kl")
            if value is None or not (value <= limit if most else value >= limit):
                shown = "not a number" if value is None else f"{value:.4g}"
                found.append(f"{name} is {shown}, and accept says {limit:g} at {'most' if most else 'least'}")
        return found


class Overrides(Section):
    """What a recipe says otherwise for one device. Keys that are not given stay as they are."""

    backend: Literal["tensorrt_engine", "tensorrt_llmapi", "openvino"] | None = Field(
        default=None, description="What runs the engine there."
    )
    tensorrt_llm: Annotated[str, AfterValidator(_known_release)] | None = Field(
        default=None, description="The release that is pinned there."
    )
    quantization: Quantization | None = Field(default=None, description="How weights are stored there.")
    kv_cache: KvCache | None = Field(default=None, description="The cache there.")
    limits: RecipeLimits | None = Field(default=None, description="How many sequences, and how long, there.")
    parallel: Parallel | None = Field(default=None, description="Split over several GPUs there.")
    services: Few | None = Field(default=None, description="Copies of the service there.")
    reserve: Annotated[str, AfterValidator(_size)] | None = Field(
        default=None, description="Memory of it that others have."
    )


class Recipe(Section):
    """One LLM service: the model, the device, and how it is quantized."""

    name: Name = Field(
        "", description="Name of the service and of its artifacts. Default: the file's name.", validate_default=False
    )
    description: str = Field(default="", description="One line for people.")
    model: Text = Field(
        description="A folder in the Hugging Face layout, or hf:ORG/NAME (ORG/NAME works too).",
        examples=["meta-llama/Llama-2-13b-chat-hf"],
    )
    device: Annotated[str, AfterValidator(_known_device)] = Field(
        description="The device that it will run on.", json_schema_extra=_offer_devices
    )
    backend: Literal["tensorrt_engine", "tensorrt_llmapi", "openvino"] | None = Field(
        default=None,
        description="What runs the engine. Default: openvino on a cpu, tensorrt_engine on a GPU (on an RTX 5090 "
        "tensorrt_llmapi).",
    )
    tensorrt_llm: Annotated[str, AfterValidator(_known_release)] | None = Field(
        default=None,
        description="Pin of the TensorRT-LLM release, in quotes. Default: the newest one that supports the device and "
        "the quantization.",
        json_schema_extra=_offer_releases,
    )
    quantization: Quantization = Field(default=Quantization(), description="How weights are stored.")
    calibration: Calibration = Field(default=Calibration(), description="The text on which ranges are measured.")
    kv_cache: KvCache = Field(default=KvCache(), description="The cache of keys and values.")
    speculative: Speculative | None = Field(
        default=None, description="Speculative decoding with a draft model or prompt lookup. Default: none."
    )
    lora: Annotated[list[LoraAdapter], Field(max_length=16)] = Field(
        default=[], description="LoRA adapters that requests may name. Default: none."
    )
    guided_decoding: Literal["xgrammar"] | None = Field(
        default=None,
        description="xgrammar: requests may hold their answers to a JSON schema, a regex or a grammar. "
        "Default: such requests are refused.",
    )
    limits: RecipeLimits = Field(default=RecipeLimits(), description="How many sequences, and how long.")
    parallel: Parallel = Field(default=Parallel(), description="Split over several GPUs.")
    services: Few = Field(default=1, description="Copies of the service on the same device.")
    reserve: Annotated[str, AfterValidator(_size)] | None = Field(
        default=None,
        description="Memory of the device that others have, such as a desktop on it. Default: none.",
        examples=["600MiB"],
    )
    accept: Accept | None = Field(
        default=None,
        description="What scalellm verify must find before the engine serves. Default: the keys' own defaults, and "
        "verifying is required only where the plan says so.",
    )
    serve: Serve = Field(default=Serve(), description="Where the server listens.")
    cpu: Cpu = Field(default=Cpu(), description="Settings of the openvino backend.")
    per_device: dict[Annotated[str, AfterValidator(_known_device)], Overrides] = Field(
        default={}, description="What is otherwise on one device, for builds with --device DEVICE,DEVICE."
    )

    _text: str = PrivateAttr("")
    _path: Path = PrivateAttr(Path())

    @property
    def text(self) -> str:
        """The text of the file, kept in the stamps of what was made from it."""
        return self._text

    @property
    def path(self) -> Path:
        return self._path

    @property
    def chosen_backend(self) -> str:
        """The backend that is named, else the device's first."""
        return self.backend or devices()[self.device].backends[0]

    def from_file(self, text: str, path: Path) -> Recipe:
        """This recipe, remembering the file that it came from."""
        self._text, self._path = text, path
        return self


@functools.cache
def schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a recipe, as published in ``recipes/recipe.schema.json``."""
    body = Recipe.model_json_schema()
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": SCHEMA_FILE, "title": "scalellm recipe"}
    return head | {key: value for key, value in body.items() if key not in head}


def available(search: Sequence[Path] | None = None) -> dict[str, Path]:
    """Name -> file of every recipe at hand; a name in an earlier folder hides the later ones.

    The current folder may hold YAML files of other programs, which are left out. ``find_recipe`` does take such a file
    when it is named: a recipe that lacks a key must be told so, not passed over for a shipped one of the same name.
    """
    needs, here = ("model", "device"), Path()
    return {name: file for name, file in _files(search).items() if file.parent != here or has_keys(file, needs)}


def _files(search: Sequence[Path] | None) -> dict[str, Path]:
    """Name -> YAML file of all that a bare name finds, in order: here, in ./recipes, among the shipped recipes."""
    found: dict[str, Path] = {}
    for folder in (Path(), Path("recipes"), workspace.shipped("recipes")) if search is None else search:
        for file in sorted(folder.glob("*")) if folder.is_dir() else ():
            if file.suffix in SUFFIXES and file.is_file():
                found.setdefault(file.stem, file)
    return found


def find_recipe(name_or_path: str, search: Sequence[Path] | None = None) -> Path:
    """A path, or a name with or without suffix -> the file. Raises RecipeError with the nearest name and the list."""
    direct = Path(name_or_path).expanduser()
    if direct.is_file() and (direct.suffix in SUFFIXES or len(direct.parts) > 1):
        return direct
    files, wanted = _files(search), direct.name.removesuffix(".yaml").removesuffix(".yml")
    if len(direct.parts) <= 1 and wanted in files:
        return files[wanted]
    known = available(search)
    near = get_close_matches(wanted, list(known), n=1)
    listed = ", ".join(known) or "none"
    raise RecipeError(
        f"no recipe {name_or_path!r}" + (f" (did you mean {near[0]!r}?)" if near else ""),
        hint=f"Recipes found here, in ./recipes and shipped: {listed}\nOr give a path: --recipe path/to/recipe.yaml",
    )


def load_recipe(name_or_path: str, *, search: Sequence[Path] | None = None) -> Recipe:
    """Find, read and check a recipe. ``search`` replaces the folders where a bare name is looked up.

    Raises RecipeError with every problem of the file at once, each with its line.
    """
    path = find_recipe(name_or_path, search)
    return parse_recipe(read_text(path, "recipe"), path)


def parse_recipe(text: str, path: Path) -> Recipe:
    """The text of a recipe -> Recipe. ``path`` names the file in messages. Raises RecipeError with every problem."""
    tree = MarkedYaml(str(path), noun="recipe", needs="model and device", example="device: rtx4090")
    data = tree.read(text)
    recipe: Recipe | None = None
    if data is not None:
        data.setdefault("name", path.stem)
        recipe = tree.validate(data, Recipe)
        for where, message in contradictions(data):
            tree.complain(where, message)
    if tree.problems or recipe is None:
        raise tree.error("Every key and its choices: scalellm recipes schema")
    return recipe.from_file(text, path)


def contradictions(data: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Keys that are sound alone and not together. Looks at raw data: it also speaks when other keys are wrong."""
    quantization, kv, limits, serve = (_section(data, key) for key in ("quantization", "kv_cache", "limits", "serve"))
    yield from _quantization_contradictions(quantization)
    if "max_tokens" in kv and "size" in kv:
        yield ("kv_cache", "size"), "give max_tokens or size, not both"
    longest = _whole(limits.get("max_seq_len"))
    yield from _window_contradictions(kv, longest)
    yield from _speculative_contradictions(data)
    prompt, tokens = _whole(limits.get("max_input_len")), _whole(kv.get("max_tokens"))
    if longest and prompt and prompt > longest:
        yield ("limits", "max_input_len"), f"{prompt} is more than max_seq_len {longest}, which counts the prompt too"
    if longest and tokens and tokens < longest and "window" not in kv:
        yield ("kv_cache", "max_tokens"), f"{tokens} holds not even one sequence of max_seq_len {longest}"
    adapters = data.get("lora")
    named = [one.get("name") for one in adapters if isinstance(one, dict)] if isinstance(adapters, list) else []
    for place, name in enumerate(named):
        if name is not None and name in named[:place]:
            yield ("lora",), f"two adapters are called {name}"
    taken: dict[int, str] = {}
    for key, default in (("http_port", 8000), ("grpc_port", 8001), ("metrics_port", 8002)):
        port = serve.get(key, default)
        if _whole(port) and taken.setdefault(port, key) != key:
            yield ("serve", key if key in serve else taken[port]), f"{taken[port]} and {key} are both {port}"
    given = data.get("device")
    found = find_device(given) if isinstance(given, str) else None
    if found and not found.is_cpu and "cpu" in data:
        yield ("cpu",), f"only with device: cpu, not {found.name}"


def _speculative_contradictions(data: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """One source of drafts, not none and not two."""
    given = data.get("speculative")
    if not isinstance(given, dict):
        return
    if "draft" in given and "lookup" in given:
        yield ("speculative", "lookup"), "give draft or lookup, not both"
    elif given.get("draft") is None and given.get("lookup") is None:
        yield ("speculative",), "give draft: FOLDER (a small model) or lookup: 3 (tokens that are looked for)"


def _window_contradictions(kv: Mapping[str, Any], longest: int | None) -> Iterator[tuple[tuple[str, ...], str]]:
    """A window that hides nothing, and sinks that do not leave room for anything else."""
    window, sinks = _whole(kv.get("window")), _whole(kv.get("sinks"))
    if sinks and "window" not in kv:
        yield ("kv_cache", "sinks"), "only with window: without one, every token stays"
    if window and sinks and sinks >= window:
        yield ("kv_cache", "sinks"), f"{sinks} sinks fill the window of {window}: nothing would be left for new tokens"
    if window and longest and window >= longest:
        yield ("kv_cache", "window"), f"{window} hides nothing: no sequence is longer than max_seq_len {longest}"


_NEEDED_WEIGHTS = {
    "group_size": ("int4", "int4_fp8"),
    "scales": ("int4", "int4_fp8"),
    "method": ("int4",),
    "clip": ("int4", "int4_fp8"),
    "fp8_scales": ("fp8",),
    "smoothquant_alpha": ("int8_sq",),
    "propagate": ("fp8", "int4", "int8", "int8_sq", "int4_fp8"),
}
"""Key of ``quantization`` -> the weights that it says something about."""


def _quantization_contradictions(quantization: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """A key that says nothing about the weights that are chosen; quiet where the choice itself is wrong."""
    weights = quantization.get("weights", "none")
    known = isinstance(weights, str) and weights in WEIGHTS
    for key, needed in _NEEDED_WEIGHTS.items():
        if known and key in quantization and weights not in needed:
            yield ("quantization", key), f"only with weights: {' or '.join(needed)}"
        elif key == "clip" and weights == "int4" and _clips(quantization):
            yield ("quantization", key), "only with method: awq"
    if weights == "int4_fp8" and quantization.get("group_size") == 64:
        yield ("quantization", "group_size"), "only 128 with weights: int4_fp8: TensorRT-LLM has no other kernel"


def _clips(quantization: Mapping[str, Any]) -> bool:
    """Whether clipping is asked for without the method that knows it."""
    return quantization.get("clip") is True and quantization.get("method", "rtn") != "awq"


def _section(data: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = data.get(key)
    return found if isinstance(found, dict) else {}


def _whole(value: Any) -> int | None:
    return value if type(value) is int else None
