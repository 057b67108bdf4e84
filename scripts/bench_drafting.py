"""What drafts, the prefix cache and a window over the cache do to the CPU engine, on a pair of small Llamas that speak.

    python scripts/make_tiny_llama.py BIG
    python scripts/make_tiny_llama.py SMALL --layers 1 --hidden 128 --kv-heads 1 --no-check
    python scripts/bench_drafting.py --model BIG --draft SMALL --work WORK

Runs the loop of the Triton model's engine process in this process, on one thread, one request at a time, the variants
by turns. Times are those that the processor spent (all threads), so that a busy machine disturbs them little. Three
tables: plain decoding over that with drafts, and the share of drafts that was accepted, in 32 bits and in those of the
machine; the first token of a prompt whose beginning was seen before over that of one that is new; and how likely the
model itself, with all its cache, finds what it wrote with a window (nats a token).
It holds no product logic, and knows nothing of Triton.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
TEMPLATES = ROOT / "model_repo_templates"
sys.path[:0] = [str(ROOT), str(TEMPLATES / "common" / "shared"), str(TEMPLATES / "openvino" / "tensorrt_llm" / "1")]

from toolchain.backends import openvino as backend  # noqa: E402
from toolchain.backends.openvino.runtime import settings  # noqa: E402
from toolchain.checkpoint import Checkpoint  # noqa: E402
from toolchain.planning.kv_window import KvWindow  # noqa: E402
from toolchain.planning.speculation import Speculation  # noqa: E402
from toolchain.progress import Silent  # noqa: E402

LONGEST, ANSWER = 2000, 64
CHAT, QUOTE = "held-out texts", "a text and its beginning again"


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description="Drafts, prefix cache and window on the CPU engine.")
    for name, what in (("model", "by make_tiny_llama.py"), ("draft", "a smaller one"), ("work", "for the engines")):
        parser.add_argument(f"--{name}", type=Path, required=True, help=what)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=4, help="drafted in a step")
    given = parser.parse_args(argv)
    for name, source in (("engine", given.model), ("draft", given.draft)):
        if not (given.work / name / "openvino_model.xml").is_file():
            backend.write(Checkpoint.open(source), given.work / name, Silent())
    texts = _texts(given.model)
    print(f"ratios: plain / variant, above 1 is faster; {given.rounds} rounds, {ANSWER} tokens, medians (10 % to 90 %)")
    speed(given.work, texts, given.rounds, given.tokens)
    prefix(given.work, texts, given.rounds)
    window(given.work, texts, given.model)


def _texts(model: Path) -> list[list[int]]:
    """The held-out documents, as ids."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    documents = json.loads((model / "held_out.json").read_text(encoding="utf-8"))
    return [tokenizer(str(document)).input_ids for document in documents]


def _engine(work: Path, **how: Any) -> Any:
    import engine_process

    speculation = how.get("speculation")
    step = LONGEST if speculation and not speculation.lookup else 256
    how = {"kv": "fp16", "precision": "f32", **how}
    told = settings(cache_tokens=8192, max_sequences=4, max_step_tokens=step, threads=1, **how)
    passport = {"limits": {"max_batch_size": 4}, "eos_token_ids": [2], "runtime": told}
    return engine_process.Engine(work / "engine", passport)


def _run(engine: Any, prompt: list[int], tokens: int = ANSWER) -> tuple[list[int], float, float, Any]:
    """-> ids, seconds to the first and to the last, and (accepted, drafted)."""
    started, first, ids, counts = time.process_time(), 0.0, [], None
    engine.add(1, np.array(prompt, np.int64).tobytes(), {"max_new_tokens": tokens, "stop_token_ids": []})
    while engine.busy:
        for event in engine.step():
            first = first or time.process_time() - started
            ids, counts = [*ids, *event[2]], event[5]
    return ids, first, time.process_time() - started, counts


def speed(work: Path, texts: list[list[int]], rounds: int, tokens: int) -> None:
    """Plain decoding against a draft model and prompt lookup; says where a text is another one."""
    sets = {
        CHAT: [text[:48] for text in texts[:6]],
        QUOTE: [[*text[:100], *text[:12]] for text in texts[:6]],
    }
    print(f"\n| arithmetic | prompts | variant | ratio | accepted of {tokens} a step | texts equal |")
    print("|---|---|---|---|---|---|")
    for precision in ("f32", "auto"):
        variants = {
            "plain": _engine(work, reuse=False, precision=precision),
            "draft": _engine(work, reuse=False, precision=precision, speculation=Speculation(None, tokens, LONGEST)),
            "lookup": _engine(
                work, reuse=False, precision=precision, speculation=Speculation(None, tokens, LONGEST, lookup=3)
            ),
        }
        for name, prompts in sets.items():
            _compare(f"{precision} | {name}", variants, prompts, rounds)


def _compare(name: str, variants: dict[str, Any], prompts: list[list[int]], rounds: int) -> None:
    """Prints a row for each variant but the plain one."""
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    counts: dict[str, list[tuple[int, int]]] = {variant: [] for variant in variants}
    equal = dict.fromkeys(variants, 0)
    for _ in range(rounds):
        for prompt in prompts:
            found = {variant: _run(engine, prompt) for variant, engine in variants.items()}
            for variant, (ids, first, last, drafts) in found.items():
                seconds[variant].append(last - first)
                counts[variant].append(drafts or (0, 0))
                equal[variant] += ids == found["plain"][0]
    for variant in ("draft", "lookup"):
        ratios = [a / b for a, b in zip(seconds["plain"], seconds[variant], strict=True)]
        accepted, drafted = (sum(pair[place] for pair in counts[variant]) for place in (0, 1))
        share = f"{accepted / max(1, drafted):.0%}"
        print(f"| {name} | {variant} | {_spread(ratios)} | {share} | {equal[variant]} of {len(ratios)} |")


def prefix(work: Path, texts: list[list[int]], rounds: int) -> None:
    """Time to the first token: with a beginning of 960 tokens that was asked before, over that of a new prompt."""
    flat = [token for text in texts for token in text]
    engines = {"prefix cache": _engine(work), "without": _engine(work, reuse=False)}
    print("\n| engine | first token, seen / new beginning |\n|---|---|")
    ratios: dict[str, list[float]] = {name: [] for name in engines}
    for round_ in range(rounds):
        begin = flat[round_ * 120 : round_ * 120 + 960]
        for name, engine in engines.items():
            new, seen = (_run(engine, [*begin, 5 + one, *flat[:30]], 2)[1] for one in (0, 1))
            ratios[name].append(seen / new)
    for name, found in ratios.items():
        print(f"| {name} | {_spread(found)} |")


def window(work: Path, texts: list[list[int]], model: Path) -> None:
    """Answers of 256 tokens after prompts of 192: how likely the model finds them, and where they begin to differ."""
    import torch
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    flat = [token for text in texts for token in text]
    prompts = [flat[start : start + 192] for start in range(0, 6 * 192, 192)]
    engines = {"whole cache": _engine(work, reuse=False)}
    for size in (96, 160, 256):
        engines[f"window {size}"] = _engine(work, reuse=False, window=KvWindow(size, 4, ring=True, prompt=LONGEST))
    written = {name: [_run(engine, prompt, 256)[0] for prompt in prompts] for name, engine in engines.items()}
    print("\n| cache | nats a token, by the model with all of it | tokens until the first other one |\n|---|---|---|")
    for name, answers in written.items():
        nats, places = [], []
        for prompt, answer, full in zip(prompts, answers, written["whole cache"], strict=True):
            with torch.no_grad():
                logits = whole(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            nats.append(float(torch.nn.functional.cross_entropy(logits, torch.tensor(answer))))
            pairs = enumerate(zip(answer, full, strict=True))
            places.append(next((place for place, (one, other) in pairs if one != other), len(answer)))
        print(f"| {name} | {statistics.fmean(nats):.3f} | {sorted(places)} |")


def _spread(values: list[float]) -> str:
    low, *_, high = statistics.quantiles(values, n=10)
    return f"{statistics.median(values):.2f} ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    main(sys.argv[1:])
