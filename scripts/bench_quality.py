"""What quantization costs a small Llama that speaks: perplexity on text it never saw, every scheme times each KV cache.

    python scripts/make_tiny_llama.py DIR --seconds 900
    python scripts/bench_quality.py --model DIR --work WORK

Quantizes the model with the stage `quantize`, once for each scheme, and runs each result with `reference_llama.py`,
which shares no code with the quantizers. A scheme is a name of SCHEMES, and words behind it change it:
`int4-awq-mse:g64:quantized` has groups of 64 and `propagate: quantized`.

Every sequence of text gives one difference against the unquantized model; the standard errors are those of a ratio of
sums over sequences, because tokens of one sequence are not independent. They say how much the result depends on the
text, not how much on the model: that takes another --model. It judges nothing and holds no product logic.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

RTN: dict[str, Any] = {"weights": "int4", "method": "rtn"}
AWQ: dict[str, Any] = {"weights": "int4", "method": "awq"}
GPTQ: dict[str, Any] = {"weights": "int4", "method": "gptq"}
SCHEMES: dict[str, dict[str, Any]] = {
    "fp16": {"weights": "none"},
    "fp8": {"weights": "fp8"},
    "int8": {"weights": "int8"},
    "int8_sq": {"weights": "int8_sq"},
    "int4_fp8": {"weights": "int4_fp8"},
    "int4-rtn-modelopt": RTN | {"scales": "modelopt"},
    "int4-rtn-mse": RTN | {"scales": "mse"},
    "int4-awq-modelopt": AWQ | {"scales": "modelopt"},
    "int4-awq-mse": AWQ | {"scales": "mse"},
    "int4-awq-clip": AWQ | {"scales": "mse", "clip": True},
    "int4-gptq-modelopt": GPTQ | {"scales": "modelopt"},
    "int4-gptq-mse": GPTQ | {"scales": "mse"},
}
WORDS: dict[str, dict[str, Any]] = {
    "g64": {"group_size": 64},
    "g128": {"group_size": 128},
    "clean": {"propagate": "clean"},
    "quantized": {"propagate": "quantized"},
    "separate": {"fp8_scales": "separate"},
}
SEQUENCE_TOKENS = 512  # at most; a document is cut at its paragraphs
LEAST_TOKENS = 32  # a shorter piece says nothing
REFERENCE = "fp16"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, required=True, help="a folder that make_tiny_llama.py made, or any Llama with --text")
    add("--work", type=Path, default=Path("bench-quality"), help="quantized folders; made ones are used again")
    add("--schemes", default=",".join(SCHEMES), help=f"comma-separated, of {', '.join(SCHEMES)}; words {list(WORDS)}")
    add("--kv", default="fp16,fp8,int8,int8-two", help="comma-separated; int8-two: keys and values have own scales")
    add("--text", type=Path, help="paragraphs to measure on, instead of the model's own held-out text")
    add("--calibration", default="builtin", help="builtin, a file, or training: the small Llama's own training text")
    add("--samples", type=int, default=64, help="rows to calibrate on (default 64, as in recipes)")
    add("--tokens", type=int, default=256, help="tokens in each row (default 256, as in recipes)")
    add("--json", type=Path, metavar="FILE", help="write everything there, the sums of each sequence included")
    args = parser.parse_args(argv)
    for name in args.schemes.split(","):
        try:
            settings(name)
        except KeyError as unknown:
            parser.error(f"{name}: {unknown} is not one of {', '.join([*SCHEMES, *WORDS])}")
    return args


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def settings(name: str) -> dict[str, Any]:
    """`int4-awq-mse:g64` -> what the stage `quantize` is called with, beside the model, the samples and the cache."""
    scheme, *words = name.split(":")
    chosen = {"group_size": 128, "scales": "mse"} | SCHEMES[scheme]
    for word in words:
        chosen |= WORDS[word]
    return chosen


# --- text ------------------------------------------------------------------------------------------------------------


def held_out_documents(model: Path) -> dict[str, list[str]]:
    """What make_tiny_llama.py held out, and what it left over of Python's documentation: never trained on.

    A paragraph that stands in the training text under another title, too, is left out.
    """
    import make_tiny_llama

    training = json.loads((model / "training.json").read_text(encoding="utf-8"))
    known, held = make_tiny_llama.documents(training["seed"])
    if held != json.loads((model / "held_out.json").read_text(encoding="utf-8")):
        raise SystemExit(f"{model}: its held-out text is not what this make_tiny_llama.py makes: train it again")
    seen = {paragraph for text in known + held for paragraph in text.removesuffix("</s>").split("\n\n")}
    left: list[str] = []
    for _title, text in sorted(python_topics().items()):
        fresh = [p for p in text.split("\n\n") if p not in seen]
        seen.update(fresh)
        if fresh:
            left.append("\n\n".join(fresh))
    return {"held_out": held, "documentation": left}


def python_topics() -> dict[str, str]:
    """Python's documentation of its language, the paragraphs that are sentences: whole, where training has a cut."""
    import make_tiny_llama

    limit, make_tiny_llama.TOPIC_CHARS = make_tiny_llama.TOPIC_CHARS, sys.maxsize
    try:
        return {title: text for title, text in make_tiny_llama.python_topics().items() if text}
    finally:
        make_tiny_llama.TOPIC_CHARS = limit


def sequences(tokenizer: Any, documents: Sequence[str], most: int = SEQUENCE_TOKENS) -> list[list[int]]:
    """Documents -> rows of at most `most` token ids, each beginning with <s>, cut between paragraphs if it can be."""
    rows = []
    for document in documents:
        row: list[int] = []
        for paragraph in document.split("\n\n"):
            ids = tokenizer.encode(("\n\n" if row else "") + paragraph, add_special_tokens=False)
            if len(row) + len(ids) >= most and row:
                rows.append(row)
                row, ids = [], tokenizer.encode(paragraph, add_special_tokens=False)
            row += ids
        rows.append(row)
    return [[tokenizer.bos_token_id, *row[: most - 1]] for row in rows if len(row) + 1 >= LEAST_TOKENS]


# --- arithmetic ------------------------------------------------------------------------------------------------------


def mean_and_error(sums: Sequence[float], counts: Sequence[int]) -> tuple[float, float]:
    """Sum and number of tokens of each sequence -> the mean of a token, and its standard error.

    The mean is m = sum(s) / sum(n), a ratio of sums over independent sequences, with the linearized standard error
    sqrt(k / (k - 1) * sum((s - m n)^2)) / sum(n) (Cochran, Sampling Techniques, 1977, section 6.4).
    """
    tokens, many = sum(counts), len(sums)
    mean = math.fsum(sums) / tokens
    squares = math.fsum((s - mean * n) ** 2 for s, n in zip(sums, counts, strict=True))
    return mean, math.sqrt(many / (many - 1) * squares) / tokens if many > 1 else math.nan


def paired(sums: Sequence[float], others: Sequence[float], counts: Sequence[int]) -> tuple[float, float]:
    """`mean_and_error` of what each sequence costs more than in `others`."""
    return mean_and_error([a - b for a, b in zip(sums, others, strict=True)], counts)


def comparisons(names: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs that answer a question: AWQ and GPTQ against plain rounding; a word against the scheme without it; mse
    against modelopt; clip against none."""
    pairs = []
    for name in names:
        scheme, *words = name.split(":")
        others = [":".join([scheme, *words[:i], *words[i + 1 :]]) for i in range(len(words))]
        swaps = (("awq", "rtn"), ("gptq", "rtn"), ("gptq", "awq"), ("mse", "modelopt"), ("clip", "mse"))
        others += [name.replace(old, new) for old, new in swaps if f"-{old}" in scheme]
        if "clip" in scheme:
            others.append(name.replace("awq-clip", "rtn-mse"))
        pairs += [(name, plain) for other in others for plain in (other, other.replace(":quantized", ""))]
    return list(dict.fromkeys(pair for pair in pairs if pair[1] in names and pair[0] != pair[1]))


# --- the work --------------------------------------------------------------------------------------------------------


def calibration_samples(args: argparse.Namespace) -> Any:
    from toolchain.quantizers.samples import load_samples

    data = args.calibration
    if data == "training":
        import make_tiny_llama

        seed = json.loads((args.model / "training.json").read_text(encoding="utf-8"))["seed"]
        data = str(args.work / "training.jsonl")
        texts = make_tiny_llama.documents(seed)[0]
        Path(data).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return load_samples(data, args.model, samples=args.samples, tokens=args.tokens, chat_template=True)


def quantized(args: argparse.Namespace, name: str, samples: Any) -> Path:
    """The folder of one scheme, with the ranges of K and V; made unless it is there with the same inputs."""
    from toolchain import workspace
    from toolchain.checkpoint import Checkpoint
    from toolchain.progress import Silent
    from toolchain.stages.quantize import quantize

    chosen = settings(name)
    code = [*sorted(ROOT.glob("toolchain/quantizers/*.py")), ROOT / "toolchain" / "stages" / "quantize.py"]
    made_by = hashlib.sha256(b"".join(file.read_bytes() for file in code)).hexdigest()
    checkpoint = Checkpoint.open(args.model)
    inputs = {"model": checkpoint.fingerprint, "samples": samples.digest, "code": made_by, **chosen}
    target: Path = args.work / f"{name.replace(':', '_')}-{workspace.key_of(inputs)[:12]}"
    if not (target / "stamp.json").is_file():
        with workspace.draft(target, "quantize", inputs) as draft:
            quantize(checkpoint, draft, kv="fp8", progress=Silent(), samples=samples, **chosen)
            draft.commit(versions={}, recipe="")
    return target


def measure(args: argparse.Namespace, rows: Sequence[list[int]]) -> dict[str, dict[str, Any]]:
    """-> by `scheme, kv`: the sum of each sequence in nats, the counts, and how long it took."""
    import reference_llama

    samples = calibration_samples(args)
    found: dict[str, dict[str, Any]] = {}
    for name in args.schemes.split(","):
        start = time.monotonic()
        folder = quantized(args, name, samples)
        made = time.monotonic() - start
        model, amaxes = reference_llama.load(folder), reference_llama.kv_amaxes(folder)
        for kv in args.kv.split(","):
            rounding = reference_llama.kv_rounding(kv, amaxes)
            results = [reference_llama.negative_log_likelihood(model, row, rounding) for row in rows]
            found[f"{name}, {kv}"] = {
                "scheme": name,
                "kv": kv,
                "settings": settings(name),
                "nats": [nats for nats, _ in results],
                "quantize_s": round(made, 2),
            }
            say(f"{name}, KV {kv}: {time.monotonic() - start:.0f} s so far")
    return found


def summarize(found: dict[str, dict[str, Any]], counts: Sequence[int]) -> None:
    """Adds mean, perplexity and the difference to the unquantized model, all with standard errors."""
    reference = found.get(f"{REFERENCE}, fp16")
    for one in found.values():
        mean, error = mean_and_error(one["nats"], counts)
        one["perplexity"], one["perplexity_error"] = math.exp(mean), math.exp(mean) * error
        if reference:
            one["more_nats"], one["more_nats_error"] = paired(one["nats"], reference["nats"], counts)


def tables(document: dict[str, Any]) -> str:
    lines = ["| weights | KV | perplexity | more nats a token than fp16 |", "|---|---|---|---|"]
    for one in document["results"].values():
        more = f"{one['more_nats']:+.4f} ± {one['more_nats_error']:.4f}" if "more_nats" in one else ""
        perplexity = f"{one['perplexity']:.3f} ± {one['perplexity_error']:.3f}"
        lines.append(f"| {one['scheme']} | {one['kv']} | {perplexity} | {more} |")
    lines += ["", "| this | against | nats a token | standard errors |", "|---|---|---|---|"]
    for one in document["comparisons"]:
        ratio = one["nats"] / one["error"] if one["error"] else 0.0
        lines.append(f"| {one['this']} | {one['against']} | {one['nats']:+.4f} ± {one['error']:.4f} | {ratio:+.1f} |")
    return "\n".join(lines)


def conditions(args: argparse.Namespace, parts: dict[str, list[list[int]]]) -> dict[str, Any]:
    training = args.model / "training.json"
    return {
        "command": " ".join(["python", "scripts/bench_quality.py", *sys.argv[1:]]),
        "model": json.loads(training.read_text(encoding="utf-8")) if training.is_file() else str(args.model),
        "calibration": {"data": args.calibration, "samples": args.samples, "tokens": args.tokens, "seed": 0},
        "parts": {name: {"sequences": len(rows), "tokens": sum(map(len, rows))} for name, rows in parts.items()},
        "text_sha256": hashlib.sha256(json.dumps(parts).encode()).hexdigest(),
        "versions": {name: version(name) for name in ("torch", "transformers", "safetensors", "numpy")},
        "python": platform.python_version(),
    }


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from transformers import AutoTokenizer

    args.work.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(str(args.model), local_files_only=True)
    documents = {"text": [args.text.read_text(encoding="utf-8")]} if args.text else held_out_documents(args.model)
    parts = {name: sequences(tokenizer, texts) for name, texts in documents.items()}
    rows = [row for part in parts.values() for row in part]
    counts = [len(row) - 1 for row in rows]
    say(f"{len(rows)} sequences, {sum(counts)} tokens to predict")
    found = measure(args, rows)
    summarize(found, counts)
    pairs = []
    for this, other in comparisons([one["scheme"] for one in found.values() if one["kv"] == "fp16"]):
        nats, error = paired(found[f"{this}, fp16"]["nats"], found[f"{other}, fp16"]["nats"], counts)
        pairs.append({"this": this, "against": other, "nats": nats, "error": error})
    document = {"conditions": conditions(args, parts), "counts": counts, "results": found, "comparisons": pairs}
    if args.json:
        args.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(tables(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
