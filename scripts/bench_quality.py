"""What quantization costs a small Llama that speaks: perplexity on text it never saw, every scheme times each KV cache.

    python scripts/make_tiny_llama.py DIR --seconds 900
    python scripts/bench_quality.py --model DIR --work WORK

Quantizes the model with the stage `quantize`, once for each scheme, and runs each result with `reference_llama.py`,
which shares no code with the quantizers. A scheme is a name of SCHEMES, and words behind it change it:
`int4-awq-mse:g64:quantized` has groups of 64 and `propagate: quantized`.

Two measures, in nats a token: how much less likely the text is than for the unquantized model (the logarithm of the
ratio of the perplexities), and the divergence KL(unquantized || quantized). The first may be below zero, where rounding
happens to favor what the text goes on with; the second is what quantization changed, whichever way. Two texts: see
`held_out_text.py`. Every sequence gives one paired difference; the standard errors are those of a ratio of sums over
sequences, because tokens of one sequence are not independent. They say how much the result depends on the text, not how
much on the model or on the calibration rows: that takes another --model or --seeds. It holds no product logic.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
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


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, action="append", required=True, help="a folder of make_tiny_llama.py; may come again")
    add("--work", type=Path, default=Path("bench-quality"), help="quantized folders; made ones are used again")
    add("--schemes", default=",".join(SCHEMES), help=f"comma-separated, of {', '.join(SCHEMES)}; words {list(WORDS)}")
    add("--kv", default="fp16,fp8,int8,int8-two", help="comma-separated; int8-two: keys and values have own scales")
    add("--text", type=Path, help="paragraphs to measure on, for a model that make_tiny_llama.py did not make")
    add("--calibration", default="builtin", help="builtin, a file, or training: the small Llama's own training text")
    add("--seeds", default="0", help="comma-separated: each draws other rows to calibrate on (default 0)")
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


def calibration_samples(args: argparse.Namespace, model: Path, seed: int) -> Any:
    from held_out_text import training_documents

    from toolchain.quantizers.samples import load_samples

    data = args.calibration
    if data == "training":
        data = str(args.work / f"{model.name}-training.jsonl")
        lines = (json.dumps({"text": text}) + "\n" for text in training_documents(model))
        Path(data).write_text("".join(lines), encoding="utf-8")
    return load_samples(data, model, samples=args.samples, tokens=args.tokens, chat_template=True, seed=seed)


def quantized(model: Path, work: Path, name: str, samples: Any) -> Path:
    """The folder of one scheme, with the ranges of K and V; made unless it is there with the same inputs."""
    from toolchain import workspace
    from toolchain.checkpoint import Checkpoint
    from toolchain.progress import Silent
    from toolchain.stages.quantize import quantize

    chosen = settings(name)
    code = [*sorted(ROOT.glob("toolchain/quantizers/*.py")), ROOT / "toolchain" / "stages" / "quantize.py"]
    made_by = hashlib.sha256(b"".join(file.read_bytes() for file in code)).hexdigest()
    checkpoint = Checkpoint.open(model)
    inputs = {"model": checkpoint.fingerprint, "samples": samples.digest, "code": made_by, **chosen}
    target = work / f"{name.replace(':', '_')}-{workspace.key_of(inputs)[:12]}"
    if not (target / "stamp.json").is_file():
        with workspace.draft(target, "quantize", inputs) as draft:
            quantize(checkpoint, draft, kv="fp8", progress=Silent(), samples=samples, **chosen)
            draft.commit(versions={}, recipe="")
    return target


def measure(args: argparse.Namespace, model: Path, seed: int, rows: Sequence[list[int]]) -> dict[str, dict[str, Any]]:
    """-> by `scheme, kv`: both measures of each sequence, summed over its tokens, and how long quantizing took."""
    import reference_llama

    samples = calibration_samples(args, model, seed)
    original = [reference_llama.log_probabilities(reference_llama.load(model), row, []) for row in rows]
    found: dict[str, dict[str, Any]] = {}
    for name in args.schemes.split(","):
        start = time.monotonic()
        folder = quantized(model, args.work, name, samples)
        made = round(time.monotonic() - start, 2)
        llama, amaxes = reference_llama.load(folder), reference_llama.kv_amaxes(folder)
        for kv in args.kv.split(","):
            rounding = reference_llama.kv_rounding(kv, amaxes)
            one: dict[str, Any] = {"scheme": name, "kv": kv, "quantize_s": made, "nats": [], "divergence": []}
            for row, first in zip(rows, original, strict=True):
                got = reference_llama.log_probabilities(llama, row, rounding)
                base = reference_llama.negative_log_likelihood(first, row)
                one["nats"].append(reference_llama.negative_log_likelihood(got, row) - base)
                one["divergence"].append(reference_llama.divergence(first, got))
            found[f"{name}, {kv}"] = one
        say(f"{model.name}, calibration {seed}: {name}, {time.monotonic() - start:.0f} s")
    return found


def summarize(
    found: dict[str, dict[str, Any]], places: dict[str, slice], counts: Sequence[int]
) -> list[dict[str, Any]]:
    """Adds `held_out nats`, `held_out divergence`, ... as [mean, standard error]. -> the same of the comparisons."""
    kinds = [(f"{part} {kind}", kind, place) for part, place in places.items() for kind in ("nats", "divergence")]
    for one in found.values():
        one["means"] = {key: mean_and_error(one[kind][place], counts[place]) for key, kind, place in kinds}
    pairs = []
    for this, other in comparisons([one["scheme"] for one in found.values() if one["kv"] == "fp16"]):
        a, b = found[f"{this}, fp16"], found[f"{other}, fp16"]
        means = {key: paired(a[kind][place], b[kind][place], counts[place]) for key, kind, place in kinds}
        pairs.append({"this": this, "against": other, "means": means})
    return pairs


def measure_model(args: argparse.Namespace, model: Path, seed: int) -> dict[str, Any]:
    """One model, calibrated on the rows that one seed draws -> what --json holds of it."""
    import held_out_text
    import reference_llama
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model), local_files_only=True)
    given = {"text": [args.text.read_text(encoding="utf-8")]} if args.text else None
    documents = given or held_out_text.untrained_documents(model)
    parts = {name: held_out_text.sequences(tokenizer, texts) for name, texts in documents.items()}
    rows = [row for part in parts.values() for row in part]
    counts = [len(row) - 1 for row in rows]
    ends = list(itertools.accumulate(map(len, parts.values())))
    places = {name: slice(end - len(part), end) for (name, part), end in zip(parts.items(), ends, strict=True)}
    found = measure(args, model, seed, rows)
    pairs = summarize(found, places, counts)
    llama = reference_llama.load(model)
    nats = [reference_llama.negative_log_likelihood(reference_llama.log_probabilities(llama, r, []), r) for r in rows]
    training = model / "training.json"
    return {
        "model": json.loads(training.read_text(encoding="utf-8")) if training.is_file() else str(model),
        "calibration": {"data": args.calibration, "samples": args.samples, "tokens": args.tokens, "seed": seed},
        "parts": {name: {"sequences": len(part), "tokens": sum(counts[places[name]])} for name, part in parts.items()},
        "text_sha256": hashlib.sha256(json.dumps(parts).encode()).hexdigest(),
        "unquantized": {name: mean_and_error(nats[place], counts[place]) for name, place in places.items()},
        "counts": counts,
        "results": found,
        "comparisons": pairs,
    }


# --- what it says ----------------------------------------------------------------------------------------------------


def table(measured: dict[str, Any]) -> list[str]:
    """Perplexity on each text, and both measures of each scheme and cache."""
    parts = list(measured["parts"])
    heads = [f"{part}: {what}" for part in parts for what in ("perplexity", "more nats", "divergence")]
    lines = [f"| weights | KV | {' | '.join(heads)} |", "|---|---|" + "---|" * len(heads)]
    for one in measured["results"].values():
        cells = []
        for part in parts:
            nats, error = measured["unquantized"][part]
            more = one["means"][f"{part} nats"]
            perplexity = math.exp(nats + more[0])
            cells.append(f"{perplexity:.2f} ± {perplexity * error:.2f}")
            cells += [figure(one["means"][kind], kind) for kind in (f"{part} nats", f"{part} divergence")]
        lines.append(f"| {one['scheme']} | {one['kv']} | {' | '.join(cells)} |")
    return lines


def figure(mean: Sequence[float], kind: str) -> str:
    digits = 5 if kind.endswith("divergence") else 4
    return f"{mean[0]:+.{digits}f} ± {mean[1]:.{digits}f}"


def pooled(measured: Sequence[dict[str, Any]]) -> list[str]:
    """The comparisons: of one run as it is; of several their mean, its standard error from their spread, and in how
    many of them `this` was the lower."""
    kinds = list(measured[0]["comparisons"][0]["means"]) if measured[0]["comparisons"] else []
    lines = [f"| this | against | {' | '.join(kinds)} |", "|---|---|" + "---|" * len(kinds)]
    for place, pair in enumerate(measured[0]["comparisons"]):
        cells = []
        for kind in kinds:
            runs = [one["comparisons"][place]["means"][kind] for one in measured]
            mean = mean_and_error([run[0] for run in runs], [1] * len(runs)) if len(runs) > 1 else runs[0]
            lower = f" ({sum(run[0] < 0 for run in runs)}/{len(runs)})" if len(runs) > 1 else ""
            cells.append(figure(mean, kind) + lower)
        lines.append(f"| {pair['this']} | {pair['against']} | {' | '.join(cells)} |")
    return lines


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    args.work.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    measured = []
    for model in args.model:
        for seed in map(int, args.seeds.split(",")):
            one = measure_model(args, model, seed)
            measured.append(one)
            lines += [
                f"{model.name}, calibration {seed}: {len(one['counts'])} sequences, {sum(one['counts'])} tokens",
                "",
            ]
            lines += [*table(one), ""]
    if args.json:
        names = ("torch", "transformers", "safetensors", "numpy")
        command = " ".join(["python", "scripts/bench_quality.py", *(sys.argv[1:] if argv is None else argv)])
        document = {"command": command, "python": platform.python_version(), "runs": measured}
        document["versions"] = {name: version(name) for name in names}
        document["schemes"] = {name: settings(name) for name in args.schemes.split(",")}
        args.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print("\n".join([*lines, *pooled(measured)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
