"""gateway: running Tritons -> OpenAI's API and FEDML's ``/predict``, in the foreground or beside a server.

What the gateway must know of the model (name, chat template, tokenizer, limits) is read from its repository, or, where
that is on another machine, from the tokenizer's folder. It prints nothing: ``on_ready`` gets the addresses.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from toolchain.accuracy import digest_of, read_verdict
from toolchain.admission import ENGINE
from toolchain.chat import ChatTemplate
from toolchain.engine import PASSPORT, Passport
from toolchain.errors import ArtifactError, ToolError
from toolchain.repository import Repository

if TYPE_CHECKING:
    from toolchain.gateway.run import Listen
    from toolchain.gateway.service import MakeEngines
    from toolchain.gateway.settings import EngineFacts, Model, Settings

TRITON_MODEL = "tensorrt_llm_bls"


def require_libraries() -> None:
    """Raises ToolError where the gateway's libraries are not installed."""
    try:
        import fastapi  # noqa: F401
        import jinja2  # noqa: F401
        import openai  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ToolError(
            f"the gateway needs {error.name}, which is not installed",
            hint="pip install 'scalellm-toolchain[gateway]'",
        ) from error


def model_of_repository(path: Path, name: str | None = None) -> Model:
    """The model that a repository holds; its recipe's name unless another is given. Raises ArtifactError."""
    from toolchain.checkpoint import read_json
    from toolchain.gateway.settings import Model
    from toolchain.gateway.tokens import load_tokenizer

    repository = Repository.open(path)
    tokenizer = path / TRITON_MODEL / "1" / "tokenizer"
    file = path / ENGINE / PASSPORT
    try:
        passport = Passport.from_json(read_json(file))
    except (KeyError, TypeError) as error:
        raise ArtifactError(f"{file}: not a passport of this scalellm: {error}") from error
    return Model(
        name=name or passport.recipe,
        created=int(file.stat().st_mtime),
        template=ChatTemplate.of(tokenizer),
        tokenizer=load_tokenizer(tokenizer),
        max_seq_len=passport.limits.max_seq_len,
        fingerprint=f"fp_{repository.stamp.key[:10]}",
        triton_model=TRITON_MODEL,
        adapters=tuple(passport.runtime.get("lora", ())),
        engine=_facts(repository, passport),
    )


def _facts(repository: Repository, passport: Passport) -> EngineFacts:
    from toolchain.gateway.settings import EngineFacts, Word

    digest = digest_of(repository.stamp.files, ENGINE)
    verdict: Word
    try:
        found = read_verdict(repository.path, digest)
    except ArtifactError as error:
        verdict, summary = "unreadable", error.message
    else:
        verdict = "not verified" if found is None else "passed" if found.passed else "failed"
        summary = found.summary if found else ""
    return EngineFacts(
        recipe=passport.recipe,
        device=passport.device,
        backend=passport.backend,
        architecture=passport.architecture,
        weights=passport.weights,
        kv=passport.kv,
        release=passport.release,
        gpus=repository.gpus,
        max_batch_size=passport.limits.max_batch_size,
        digest=digest[:12],
        verdict=verdict,
        verdict_summary=summary,
    )


def model_of_tokenizer(folder: Path | None, name: str, max_seq_len: int | None = None) -> Model:
    """A model whose repository is elsewhere. Without a tokenizer's folder, chats are written as Llama-2's, and prompts
    are not counted. Raises ArtifactError.
    """
    from toolchain.gateway.settings import Model
    from toolchain.gateway.tokens import load_tokenizer

    template = ChatTemplate.of(folder) if folder else ChatTemplate(None)
    tokenizer = load_tokenizer(folder) if folder else None
    return Model(name, int(time.time()), template, tokenizer, max_seq_len, triton_model=TRITON_MODEL)


def gateway(settings: Settings, listen: Listen, *, on_ready: Callable[[Listen], None]) -> None:
    """Serves until SIGINT or SIGTERM, then drains. Raises ScalellmError for what is unsafe or cannot be served."""
    from toolchain.gateway import run

    run.serve(settings, listen, on_ready=on_ready)


@contextmanager
def background(
    settings: Settings, listen: Listen, *, log: Path, engines: MakeEngines | None = None
) -> Iterator[Listen]:
    """Serves in a thread for the length of a ``with`` block; log lines are appended to ``log``. ``engines``:
    what is behind it, where that is not the Tritons of the settings.
    """
    from toolchain.gateway import run
    from toolchain.gateway.logs import Log

    with (
        log.open("a", encoding="utf-8") as stream,
        run.background(settings, listen, log=Log(stream), engines=engines) as bound,
    ):
        yield bound
