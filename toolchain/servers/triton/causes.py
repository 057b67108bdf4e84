"""What Triton's log says about a failed start, in one sentence: a table of known causes, each with what to do about it.

Every pattern was taken from a log of Triton 2.51 that failed for that reason, except where noted.
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

_TABLE = (
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
