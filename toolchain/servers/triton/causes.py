"""What Triton's log says about a failed start, in one sentence: a table of known causes, each with what to do about it.

Every pattern was taken from a log of Triton 2.51 that failed for that reason, except where another source is named.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from toolchain.runner import tail

_LINES = 400


@dataclass(frozen=True)
class Cause:
    """Why a start failed, and the next thing to do."""

    message: str
    hint: str = ""


@dataclass(frozen=True)
class _Known:
    pattern: re.Pattern[str]
    message: str
    """A template for the pattern's named groups."""
    hint: str = ""


def _known(pattern: str, message: str, hint: str = "") -> _Known:
    return _Known(re.compile(pattern), message, hint)


_MODEL = r"failed to load '(?P<model>[^']+)' version \S+ "

_OF_TENSORRT_LLM = (
    # tensorrtllm_backend issues 281 and 438; before the next, which may follow from it
    _known(
        r"(?:CUDA runtime error in [^\n]*: out of memory|Cuda Runtime \(out of memory\))",
        "the GPU ran out of memory while the engine was loading",
        "nvidia-smi shows what else takes it; or take less: max_batch_size, kv_cache max_tokens (scalellm plan)",
    ),
    # tensorrtllm_backend issues 531, 375, 424 and NVIDIA/TensorRT-LLM issue 660
    _known(
        r"(?:kSERIALIZATION_VERSION failed|Expected length != real length|Expected length \S+ != real length"
        r"|expecting (?:\[TensorRT\] )?library version|Failed to deserialize cuda engine)",
        "the engine was built by another version of TensorRT than this server has",
        "serve it in the image of its own release (scalellm serve picks it), or build it again for this one",
    ),
    # tensorrtllm_backend issues 271 and 323
    _known(
        r"When KV cache block reuse is set, model has to be built with paged context FMHA",
        "KV reuse is on, and the engine was built without paged-context attention",
        "scalellm build writes the two alike: package this engine again",
    ),
    # tensorrtllm_backend issues 168 and NVIDIA/TensorRT-LLM 494
    _known(
        r"maxTokensInPagedKvCache must be large enough",
        "the KV cache does not hold one sequence of full length: something else takes the GPU's memory",
        "nvidia-smi shows what; with several services each must find its share free (scalellm plan)",
    ),
    # tensorrtllm_backend issues 328 and 363
    _known(
        r"cudaDeviceGetDefaultMemPool[^\n]*operation not supported",
        "this GPU has no CUDA memory pools, as virtual GPUs (vGPU) do not unless they are set up for it",
        "use the whole GPU, or a vGPU profile with unified memory",
    ),
    # src/model_instance_state.cc of tensorrtllm_backend @v0.12.0 to v0.19.0
    _known(
        r"Both encoder and decoder model paths are empty",
        "the engine was not found: its path is relative to the repository, and the server was started elsewhere",
        "scalellm serve --repository DIR, or start tritonserver in the repository's folder",
    ),
)
"""What NVIDIA's backend writes while it loads an engine: taken from reports of others, not seen here."""

_TABLE = (
    *_OF_TENSORRT_LLM,
    _known(
        r"(?:Socket '(?P<socket>[^']+)' already in use|[Ff]ailed to bind.*?(?P<address>\S+:\d+))",
        "an address is already in use: {socket}{address}",
        "wait until the other server has ended, or choose other ports",
    ),
    _known(
        r"(?P<library>\S+): cannot open shared object file",
        "the library {library} is missing",
        "install the package that holds it, or put its folder on LD_LIBRARY_PATH",
    ),
    _known(
        _MODEL + r"Internal: ModuleNotFoundError: No module named '(?P<module>[^']+)'",
        "model {model} needs the Python module {module}, which is not installed",
        "install it into the environment that runs scalellm",
    ),
    _known(
        _MODEL + r"Internal: (?P<what>MemoryError|[^\"]*std::bad_alloc|[^\"]*[Oo]ut of memory)",
        "model {model} ran out of memory while loading ({what})",
        "free some memory, or take a smaller model, context or KV cache (scalellm plan shows where it goes)",
    ),
    _known(
        r"(?:unpack_from requires a buffer|numpy\.core\.multiarray failed to import|_ARRAY_API not found)",
        "the Python backend met numpy 2, with which this Triton does not work",
        "pip install 'numpy>=1.26.4,<2'",
    ),
    _known(
        r"(?:Timed out occurred while waiting for the stub process|stub process .*? timed? ?out)(?P<rest>[^\"]*)",
        "a Python model did not start in time: {rest}",  # from the source of python_backend r24.10, not seen here
        "see its output in the log",
    ),
    _known(
        _MODEL + r"Internal: Stub process '[^']+' is not healthy",
        "the Python process of model {model} died while loading",
        "if its output in the log says nothing: the kernel may have ended it for want of memory (dmesg)",
    ),
    _known(_MODEL + r"(?P<kind>[A-Z][A-Za-z ]*): (?P<what>[^\"]+)", "model {model} does not load: {what}"),
    _known(r"Poll failed for model directory '(?P<model>[^']+)': (?P<what>[^\"]+)", "model {model}: {what}"),
    _known(r"failed to open model repository|failed to stat file (?P<what>\S+)", "cannot read the repository: {what}"),
    _known(r"Unable to find backend library for backend '(?P<backend>[^']+)'", "this Triton has no backend {backend}"),
    _known(r"error: creating server: (?P<what>.+)", "tritonserver refused to start: {what}"),
)


def lost_a_lock(log: Path) -> bool:
    """Whether Triton ended itself over a lock that its Python backend shares with a model's process.

    A bug of Triton that comes by chance, more often on a busy machine, and goes with a new start
    (https://github.com/triton-inference-server/server/issues/5949 and 8882; seen here with 2.51 while models loaded).
    """
    return "boost::interprocess::lock_exception" in tail(log, _LINES)


def diagnose(log: Path) -> Cause | None:
    """The first known cause in the last lines of a log, by the order of the table; None where nothing is known."""
    text = tail(log, _LINES)
    for known in _TABLE:
        if match := known.pattern.search(text):
            values = {name: _first_line(value or "") for name, value in match.groupdict().items()}
            return Cause(known.message.format(**values).rstrip(": "), known.hint)
    return None


def failed_model(log: Path) -> bool:
    """Whether some model has already failed; tritonserver would still load all the others before it gives up."""
    return re.search(_MODEL, tail(log, _LINES)) is not None


def still_loading(log: Path) -> list[str]:
    """The models whose loading began and did not end."""
    text = tail(log, _LINES)
    begun = re.findall(r'"loading: ([^:"]+):', text)
    ended = set(re.findall(r"(?:successfully loaded|failed to load) '([^']+)'", text))
    return [model for model in dict.fromkeys(begun) if model not in ended]


def _first_line(text: str) -> str:
    """Without the Python traceback, whose line breaks Triton writes as a backslash and an n."""
    return re.split(r"\\n|\n", text.strip())[0]
