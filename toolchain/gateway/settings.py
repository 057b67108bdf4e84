"""What a gateway is told at its start. Plain data; nothing here is read from a request."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from toolchain.chat import ChatTemplate
from toolchain.gateway.tokens import Tokenizer

Word = Literal["passed", "failed", "not verified", "unreadable"]


@dataclass(frozen=True)
class EngineFacts:
    """What an engine's passport says, for people: words, not numbers to compute with."""

    recipe: str
    device: str
    backend: str
    architecture: str
    weights: str
    kv: str
    release: str | None
    """TensorRT-LLM; None for an engine that needs none."""
    gpus: int
    """Ranks of one engine; 0 on a CPU."""
    max_batch_size: int
    digest: str
    """The beginning of the hash of the engine's files."""
    verdict: Word
    """Of ``scalellm verify``, when the gateway was started."""
    verdict_summary: str


@dataclass(frozen=True)
class Model:
    """The one model that a gateway serves."""

    name: str
    created: int
    """Unix time, for ``/v1/models``."""
    template: ChatTemplate
    tokenizer: Tokenizer | None = None
    """None: prompts are not counted before they are sent."""
    max_seq_len: int | None = None
    """Tokens of prompt and answer together."""
    fingerprint: str | None = None
    """Changes with the engine: OpenAI's ``system_fingerprint``."""
    triton_model: str = "tensorrt_llm_bls"
    engine: EngineFacts | None = None
    """None where its repository is elsewhere."""
    adapters: tuple[str, ...] = ()
    """LoRA adapters; ``NAME:ADAPTER`` is a model of its own to clients."""

    @property
    def names(self) -> tuple[str, ...]:
        """What a request may name: the model, and each adapter; the place is Triton's ``lora_task_id``."""
        return (self.name, *(f"{self.name}:{adapter}" for adapter in self.adapters))


@dataclass(frozen=True)
class Upstream:
    """One Triton."""

    http_url: str
    metrics_url: str | None = None
    status_file: Path | None = None
    """Where its engine writes what it is doing, on this machine."""


@dataclass(frozen=True)
class Timeouts:
    """Seconds. A request that exceeds one ends with an error, and its place in the engine is freed."""

    connect_s: float = 5.0
    body_s: float = 30.0
    """Until a client has sent its whole request."""
    first_token_s: float = 300.0
    """Queueing and prefill."""
    between_tokens_s: float = 60.0
    request_s: float = 1800.0
    """The whole of it."""
    write_s: float = 60.0
    """Until a client has taken one piece of its answer."""
    patience_s: float = 20.0
    """How long a request waits for a Triton while none is there, such as during a restart."""


@dataclass(frozen=True)
class Limits:
    """What one gateway takes."""

    max_body_bytes: int = 4 * 2**20
    max_running: int = 0
    """Requests at the engines at once; 0: as many as the Tritons behind it say that they take."""
    max_queue: int = 64
    """Requests that wait for one of those places."""
    queue_s: float = 30.0
    """How long one waits, and as long again where the engines turn out to be full."""
    max_answers: int = 32
    """``n``."""
    default_tokens: int = 1024
    """``max_tokens`` of a chat that names none, where the engine's own limit is not known."""
    predict_tokens: int = 256
    """The same for ``/predict``."""


@dataclass(frozen=True)
class Settings:
    """Everything about one gateway but its addresses."""

    model: Model
    upstreams: tuple[Upstream, ...]
    timeouts: Timeouts = field(default_factory=Timeouts)
    limits: Limits = field(default_factory=Limits)
    keys: Path | None = None
    """The file of hashed keys; without one, or with an empty one, nobody is asked for a key."""
    fedml_compat: Literal["json", "repr"] = "json"
    log_prompts: bool = False
    page: bool = True
    """Whether ``/`` is a page."""
    kserve: Path | None = None
    """The config.pbtxt of the model as KServe's clients know it; without one there are no KServe doors here: where
    there is one Triton, it has its own.
    """
