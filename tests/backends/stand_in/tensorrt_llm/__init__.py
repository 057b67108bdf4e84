"""A stand-in for TensorRT-LLM's LLM API: the same names, refusals and life of a request, and tokens from arithmetic.

Tests put this folder on a Python path. It shares nothing with scalellm. What it takes and refuses is written down from
the real source: argument models that forbid unknown names (tensorrt_llm/llmapi/llm_args.py), SamplingParams
(tensorrt_llm/sampling_params.py @000a01de), RequestOutput (tensorrt_llm/executor/result.py @005bc848). Everything that
happens to it is written to ``calls.jsonl`` beside this file.

The answer to a prompt is letters: the next one follows from the sum of the prompt's ids, the place, and the seed where
it samples. It ends with the end id after ``ANSWER`` letters. Seed 666 breaks a request, seed 999 the whole engine.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pydantic

__version__ = "1.2.1"
ANSWER = 40
BREAKS_REQUEST, BREAKS_ENGINE = 666, 999
_CALLS = Path(__file__).with_name("calls.jsonl")


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")


class KvCacheConfig(_Strict):
    enable_block_reuse: bool = True
    max_tokens: int | None = None
    max_attention_window: list[int] | None = None
    sink_token_length: int | None = None
    free_gpu_memory_fraction: float | None = pydantic.Field(0.9, ge=0, le=1)
    host_cache_size: int | None = None
    enable_partial_reuse: bool = True
    dtype: str = "auto"


class CudaGraphConfig(_Strict):
    batch_sizes: list[int] | None = None
    max_batch_size: int = pydantic.Field(0, ge=0)
    enable_padding: bool = False


class _TorchLlmArgs(_Strict):
    model: str
    backend: Literal["pytorch"] = "pytorch"
    tokenizer: str | None = None
    skip_tokenizer_init: bool = False
    trust_remote_code: bool = False
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    dtype: str = "auto"
    kv_cache_config: KvCacheConfig = KvCacheConfig()
    cuda_graph_config: CudaGraphConfig | None = CudaGraphConfig()
    enable_chunked_prefill: bool = False
    guided_decoding_backend: Literal["xgrammar", "llguidance"] | None = None
    max_batch_size: int | None = None
    max_input_len: int | None = None
    max_seq_len: int | None = None
    max_beam_width: int | None = None
    max_num_tokens: int | None = None
    disable_overlap_scheduler: bool = False
    stream_interval: int = 1


class _Args10(_TorchLlmArgs):
    enable_trtllm_sampler: bool = False
    enable_mixed_sampler: bool = False


class _Args11(_TorchLlmArgs):
    sampler_type: Literal["TRTLLMSampler", "TorchSampler", "auto"] = "auto"


def args_of(release: str) -> type[_TorchLlmArgs]:
    """The arguments of ``LLM`` in a release."""
    return _Args10 if release.startswith("1.0") else _Args11


@dataclass(slots=True, kw_only=True)
class SamplingParams:
    end_id: int | None = None
    pad_id: int | None = None
    max_tokens: int = 32
    bad: Any = None
    bad_token_ids: list[int] | None = None
    stop: Any = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    embedding_bias: Any = None
    n: int = 1
    best_of: int | None = None
    use_beam_search: bool = False
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    temperature: float | None = None
    min_tokens: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    length_penalty: float | None = None
    logprobs: int | None = None
    return_context_logits: bool = False
    return_generation_logits: bool = False
    exclude_input_from_output: bool = True
    return_perf_metrics: bool = False
    ignore_eos: bool = False
    detokenize: bool = True
    add_special_tokens: bool = True
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        if self.end_id is None:
            raise ValueError("tokenizer is required to reset end_id if it is None")


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None


@dataclass
class CompletionOutput:
    index: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: Any = None


class RequestError(RuntimeError):
    """What the executor raises for one request."""


class RequestOutput:
    """A result: iterate over it to see it grow; it belongs to the event loop that it was made in."""

    def __init__(self, llm: LLM, prompt: list[int], params: SamplingParams, streaming: bool) -> None:
        self.finished = False
        self.outputs = [CompletionOutput()]
        self._queue: asyncio.Queue[Exception | None] = asyncio.Queue()
        self._task = asyncio.get_running_loop().create_task(self._grow(llm, prompt, params, streaming))

    def abort(self) -> None:
        note({"call": "abort", "tokens": len(self.outputs[0].token_ids)})
        self._task.cancel()
        self.outputs[0].finish_reason = "cancelled"
        self.finished = True

    def __aiter__(self) -> RequestOutput:
        return self

    async def __anext__(self) -> RequestOutput:
        if self.finished and self._queue.empty():
            raise StopAsyncIteration
        error = await self._queue.get()
        if error is not None:
            raise error
        return self

    async def _grow(self, llm: LLM, prompt: list[int], params: SamplingParams, streaming: bool) -> None:
        answer = self.outputs[0]
        for place in range(params.max_tokens):
            await asyncio.sleep(0.002)
            if params.seed in (BREAKS_REQUEST, BREAKS_ENGINE) and place == 5:
                llm.broken = params.seed == BREAKS_ENGINE
                self.finished = True
                self._queue.put_nowait(RequestError("CUDA error: an illegal memory access was encountered"))
                return
            token = llm.token(prompt, place, params)
            answer.token_ids.append(token)
            if params.logprobs:
                answer.logprobs.append({token: Logprob(-0.25), token + 1: Logprob(-2.0)})
            if not params.ignore_eos and token in (params.end_id, *(params.stop_token_ids or ())):
                answer.finish_reason = "stop"
            elif place == params.max_tokens - 1:
                answer.finish_reason = "length"
            self.finished = answer.finish_reason is not None
            if self.finished or streaming:
                self._queue.put_nowait(None)
            if self.finished:
                return


class LLM:
    def __init__(self, **arguments: Any) -> None:
        self.args = args_of(__version__)(**arguments)
        folder = Path(self.args.model)
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{folder} is no model")
        vocabulary = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
        self._letters = [vocabulary[letter] for letter in "abcdefghijklmnopqrstuvwxyz"]
        self.broken = False
        note({"call": "LLM", "arguments": {name: _plain(value) for name, value in arguments.items()}})

    def token(self, prompt: list[int], place: int, params: SamplingParams) -> int:
        """The next id: greedy decoding depends on the prompt alone, sampling on the seed, too."""
        if place >= max(ANSWER, params.min_tokens or 0) and not params.ignore_eos:
            assert params.end_id is not None
            return params.end_id
        chance = 0 if params.top_k == 1 else 1 + (params.seed or 0) * 7919
        return self._letters[(sum(prompt) + place * (3 + chance % 5) + chance) % len(self._letters)]

    def generate_async(
        self, inputs: list[int], sampling_params: SamplingParams | None = None, streaming: bool = False
    ) -> RequestOutput:
        if self.broken:
            raise RuntimeError("the executor has been shut down")
        if not isinstance(inputs, list) or not all(isinstance(one, int) for one in inputs):
            raise TypeError(f"The inputs must be type str or list of int, but got {type(inputs)}")
        assert isinstance(sampling_params, SamplingParams)
        return RequestOutput(self, inputs, sampling_params, streaming)

    def _check_health(self) -> bool:
        return not self.broken

    def shutdown(self) -> None:
        note({"call": "shutdown"})


def _plain(value: Any) -> Any:
    return value.model_dump(exclude_unset=True) if isinstance(value, pydantic.BaseModel) else value


def note(call: dict[str, Any]) -> None:
    """Append to the record of what happened."""
    with _CALLS.open("a") as stream:
        stream.write(json.dumps(call) + "\n")
