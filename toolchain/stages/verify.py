"""Measure a quantized checkpoint against the model that it was made from, and write the report.

A layer at a time: memory is bounded, and an interrupted run continues at the layer in hand. It judges nothing: what is
good enough, the recipe says.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain import __version__, workspace
from toolchain.checkpoint import Checkpoint
from toolchain.endpoint import Endpoint
from toolchain.errors import EndpointError, RejectedError
from toolchain.progress import Progress
from toolchain.quantizers import documents
from toolchain.quantizers.place import ON_CPU, Place, memory_errors, open_device, resident

if TYPE_CHECKING:
    from toolchain.quality.answers import Answer
    from toolchain.quality.measures import Measure
    from toolchain.quality.passes import Found, Way
    from toolchain.quantizers.samples import Samples

VERSION = "1"
"""Raised when the same checkpoint and text would give other numbers."""

REPORT = "report.json"
ANSWERS = "answers.json"

ORIGINAL, WEIGHTS = "original", "weights"
"""How the report calls the unquantized model, and the quantized one without a rounded cache; with one it is called as
the cache is, ``"int8"`` or ``"fp8"``."""


def verify(
    original: Checkpoint,
    quantized: Checkpoint,
    draft: workspace.Draft,
    *,
    kvs: Sequence[str],
    rounds_inputs: bool,
    samples: Samples,
    progress: Progress,
    place: Place = ON_CPU,
) -> dict[str, Any]:
    """Fill ``draft`` with ``report.json``; the caller commits it. -> the report.

    ``kvs``: caches to simulate, of ``"int8"`` and ``"fp8"``; ``rounds_inputs``: whether the engine rounds the inputs of
    linear layers where the checkpoint has scales for that. Both as TensorRT-LLM does (``quality.rounding``): each token
    attends to rounded keys and values of all tokens before it, while an engine may keep those of the prompt in hand
    unrounded until it is done; so the cache is shown at its worst.

    Raises ArtifactError where the checkpoints do not belong together or hold NaN or infinity, PlanError where a layer
    does not fit the memory.
    """
    from toolchain.quality.need import choose_chunk
    from toolchain.quality.passes import Passes, Way

    ways = [Way(ORIGINAL, quantized=False), Way(WEIGHTS, quantized=True)]
    ways += [Way(kv, quantized=True, kv=kv) for kv in kvs]
    device = open_device(place)
    count, tokens = samples.token_ids.shape
    chunk = choose_chunk(original.config, count, tokens, len(ways), max_ram=place.max_ram, base=resident())
    with memory_errors():
        passes = Passes(
            original,
            quantized,
            ways,
            samples,
            draft.path,
            chunk_tokens=chunk,
            rounds_inputs=rounds_inputs,
            device=device,
        )
        documents.check_room(draft, passes.nbytes)
        found = passes.run(draft.journal(), draft.record, progress)
    passes.clear()
    report = _report(original, quantized, ways, samples, found, rounds_inputs=rounds_inputs)
    workspace.write_durably(draft.path / REPORT, (json.dumps(report, indent=1) + "\n").encode())
    return report


def ask(
    endpoint: Endpoint, prompts: Sequence[str], tokenizer: Any, *, max_tokens: int, progress: Progress
) -> list[Answer]:
    """Each prompt to a running server, greedily, one after the other. -> its tokens.

    As the server says them, which takes ``return_log_probs``; where it does not know that, from its text.
    """
    from toolchain.quality.answers import Answer

    found: list[Answer] = []
    log_probs = True
    with progress.task("verify: ask the server", len(prompts), "prompts") as task:
        for text in prompts:
            sent = tuple(int(one) for one in tokenizer.encode(text))
            try:
                said, outputs = _answer(endpoint, text, max_tokens, log_probs)
            except RejectedError:
                if not log_probs:
                    raise
                log_probs = False
                said, outputs = _answer(endpoint, text, max_tokens, log_probs)
            given, probabilities = (_flat(outputs.get(name)) for name in ("output_ids", "output_log_probs"))
            count = len(probabilities) if log_probs else max_tokens
            tokens = tuple(map(int, given)) if given else _tokens(tokenizer, text, sent, said)
            task.advance(1)
            if len(tokens) != count and log_probs:
                continue  # not the tokens that it gave
            # The answer's end is a token to compare too, where all that came before it are known.
            ended = len(tokens) == count < max_tokens
            found.append(Answer(sent, tokens, ended, tuple(probabilities) or None))
    if not found:
        raise EndpointError(
            f"{endpoint.http_url}: {endpoint.model} does not say the tokens of its answers, and its texts can be cut "
            "into tokens in other ways",
            hint="Ask a model that does: --triton-model tensorrt_llm_bls",
        )
    if len(found) < len(prompts):
        progress.note(f"verify: {len(prompts) - len(found)} answers left out: their text gives other tokens again")
    return found


def _answer(endpoint: Endpoint, text: str, max_tokens: int, log_probs: bool) -> tuple[str, Mapping[str, Any]]:
    """-> the text behind the prompt, and the other outputs."""
    asked = {"exclude_input_in_output": True, "return_log_probs": log_probs or None}
    chunks = list(endpoint.generate(text, max_tokens=max_tokens, protocol="http", stream=False, **asked))
    return "".join(chunk.text for chunk in chunks), chunks[-1].outputs


def _tokens(tokenizer: Any, text: str, sent: Sequence[int], said: str) -> tuple[int, ...]:
    """The tokens that an answer's text is made of, without half a character at its end.

    Mostly those that the engine gave: a text can be cut into tokens in more ways than one.
    """
    whole = [int(one) for one in tokenizer.encode(text + said.rstrip("\ufffd"))]
    if whole[: len(sent)] == list(sent):
        return tuple(whole[len(sent) :])
    return tuple(int(one) for one in tokenizer.encode(said.rstrip("\ufffd"), add_special_tokens=False))


def _flat(values: Any) -> list[float]:
    """A number or nested lists of them, or None -> one list."""
    if isinstance(values, list):
        return [one for value in values for one in _flat(value)]
    return [] if values is None else [values]


def answers_report(
    quantized: Checkpoint,
    answers: Sequence[Answer],
    folder: Path,
    *,
    kv: str | None,
    rounds_inputs: bool,
    progress: Progress,
    place: Place = ON_CPU,
) -> dict[str, Any]:
    """The answers of a running engine against the checkpoint's own forward pass, written to ``folder/answers.json``."""
    from toolchain.quality.answers import compare_answers, measures

    with tempfile.TemporaryDirectory(dir=folder, prefix="verify-") as states, memory_errors():
        how = {"kv": kv, "rounds_inputs": rounds_inputs}
        compared = compare_answers(
            quantized, answers, Path(states), kv=kv, rounds_inputs=rounds_inputs, progress=progress, place=place
        )
    report = {
        "report": "answers",
        "scalellm": __version__,
        "checkpoint": str(quantized.path),
        **how,
        "units": {"agreement_length": "tokens", "regret": "nats a token", "log_prob_error": "nats a token"},
        "measures": _plain(measures(compared)),
        "answers": [{**asdict(one), **asdict(other)} for one, other in zip(answers, compared, strict=True)],
    }
    workspace.write_durably(folder / ANSWERS, (json.dumps(report, indent=1) + "\n").encode())
    return report


def _report(
    original: Checkpoint,
    quantized: Checkpoint,
    ways: Sequence[Way],
    samples: Samples,
    found: Found,
    *,
    rounds_inputs: bool,
) -> dict[str, Any]:
    count, tokens = samples.token_ids.shape
    counts = [tokens - 1] * count
    first = found.predictions[ORIGINAL]
    algo = quantized.quantization.quant_algo if quantized.quantization else None
    models = {}
    for way in ways:
        one = found.predictions[way.name]
        models[way.name] = {
            "kv": way.kv,
            **_plain(one.measures(first, counts)),
            "sequences": {"nats": list(one.nats), "kl": list(one.kl), "agree": list(one.agree)},
        }
    return {
        "report": "quality",
        "scalellm": __version__,
        "version": VERSION,
        "original": str(original.path),
        "checkpoint": str(quantized.path),
        "quant_algo": algo,
        "inputs_rounded": rounds_inputs,
        "text": {"source": samples.source, "digest": samples.digest, "sequences": count, "tokens": tokens},
        "units": {"kl": "nats a token", "sequences": "sums over tokens - 1 predictions of a sequence"},
        "models": models,
        "caches": found.caches,
    }


def _plain(measures: Mapping[str, Measure]) -> dict[str, Any]:
    return {name: one.to_json() for name, one in measures.items()}
