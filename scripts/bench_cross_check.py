"""Our instrument beside NVIDIA's AIPerf: the same Triton, the same prompts, in turns; the difference of TTFT and ITL.

    python3 -m venv .venv-aiperf && .venv-aiperf/bin/pip install aiperf==0.13.0      # 1.2 GB, an environment of its own
    scalellm serve --recipe tiny &
    python scripts/bench_cross_check.py --aiperf .venv-aiperf/bin/aiperf --tokenizer DIR

Each gets role-play prompts of its own, of the same length, because a server that keeps prompts in its cache would
answer the second instrument at once; ``--same-prompts`` is for a server without such a cache. Both post to
``generate_stream`` (AIPerf speaks no gRPC) and ask for exactly as many tokens. AIPerf counts ITL as we do: (end -
first token) / (tokens - 1). Who goes first changes from round to round.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

from toolchain.measuring.doors import Door
from toolchain.measuring.prompts import Prompt, Tokens, roleplay
from toolchain.measuring.report import Load
from toolchain.measuring.statistics import percentile, ratio_of_percentiles
from toolchain.progress import Silent
from toolchain.stages.bench import Asked, Provenance, bench

WARMUP = 3
Times = dict[str, list[float]]
"""``ttft`` and ``itl``, in milliseconds."""


def ours(given: argparse.Namespace, tokens: Tokens, file: Path) -> Times:
    asked = Asked(
        loads=(Load(kind="closed", concurrency=given.concurrency),),
        file=file,
        output_tokens=given.output_tokens,
        requests=given.requests,
        warmup=WARMUP,
    )
    door = Door("triton-http", given.url, given.name, ignore_eos=True)
    run = bench([door], asked, tokens, Provenance("cross-check"), Silent()).runs[0]
    for flag in run.flags():
        print(f"  our red flag: {flag}")
    return {name: [1000 * one for one in run.values(key)] for name, key in (("ttft", "ttft_s"), ("itl", "itl_s"))}


def theirs(given: argparse.Namespace, file: Path, out: Path) -> Times:
    body = f'{{"text_input": {{{{ text|tojson }}}}, "max_tokens": {given.output_tokens}, '
    body += f'"min_tokens": {given.output_tokens}, "stream": true}}'
    argv = [given.aiperf, "profile", "-m", given.name, "--url", given.url, "--endpoint-type", "template", "--streaming"]
    argv += ["--custom-endpoint", f"/v2/models/{given.name}/generate_stream"]
    argv += ["--extra-inputs", json.dumps({"payload_template": body, "response_field": "text_output"})]
    argv += ["--tokenizer", str(given.tokenizer), "--concurrency", str(given.concurrency)]
    argv += ["--request-count", str(given.requests), "--warmup-request-count", str(WARMUP)]
    argv += ["--input-file", str(file), "--custom-dataset-type", "single_turn", "--ui", "none", "--no-gpu-telemetry"]
    done = subprocess.run([*argv, "--output-artifact-dir", str(out)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"aiperf ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")
    records = [json.loads(line) for line in (out / "profile_export.jsonl").read_text().splitlines()]
    rows = [one["metrics"] for one in records if one["metadata"]["benchmark_phase"] == "profiling"]
    names = (("ttft", "time_to_first_token"), ("itl", "inter_token_latency"))
    return {name: [row[key]["value"] for row in rows if key in row] for name, key in names}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--aiperf", required=True, help="its program")
    parser.add_argument("--tokenizer", type=lambda text: Path(text).resolve(), required=True, help="the model's folder")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--name", default="tensorrt_llm_bls", help="the Triton model")
    parser.add_argument("--length", type=int, default=512, help="tokens of each prompt")
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--concurrency", type=int, default=1)
    parser.add_argument("--requests", type=int, default=20, help="in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--same-prompts", action="store_true", help="the server keeps no prompts in a cache")
    return parser.parse_args()


def write(file: Path, prompts: list[Prompt]) -> None:
    file.write_text("".join(json.dumps({"text": one.text}) + "\n" for one in prompts))


def main() -> None:
    given = parse()
    tokens = Tokens.load(given.tokenizer)
    found: dict[str, Times] = {who: {"ttft": [], "itl": []} for who in ("ours", "aiperf")}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(given.rounds):
            for who in ("ours", "aiperf") if number % 2 == 0 else ("aiperf", "ours"):
                file = Path(folder) / f"{number}-{who}.jsonl"
                seed = f"{number}" if given.same_prompts else f"{number} {who}"
                write(file, roleplay(tokens.of_prompt, given.length, given.requests + WARMUP, 1, seed=seed))
                times = ours(given, tokens, file) if who == "ours" else theirs(given, file, Path(folder) / str(number))
                for name, values in times.items():
                    found[who][name] += values
                medians = ", ".join(f"{name} p50 {percentile(values, 50):.2f} ms" for name, values in times.items())
                print(f"round {number + 1}, {who}: {medians}", flush=True)
    for name in ("ttft", "itl"):
        a, b = found["aiperf"][name], found["ours"][name]
        for percent in (50, 90):
            ratio = ratio_of_percentiles(a, b, percent)
            left, right = percentile(a, percent), percentile(b, percent)
            print(
                f"{name} p{percent}: AIPerf {left:.2f} ms ({len(a)}), ours {right:.2f} ms ({len(b)}), difference "
                f"{right - left:+.2f} ms, ours / AIPerf {ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"
            )


if __name__ == "__main__":
    main()
