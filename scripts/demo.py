"""The main job, whole, on this machine: ``make demo``.

Trains a small Llama, builds it with ``scalellm build --recipe tiny``, serves it on a real Triton Inference Server, asks
it over KServe HTTP and over gRPC streaming, and says where everything lies. Every step is the command that a person
would type, and is printed before it runs. A second run rebuilds nothing.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCALELLM = str(Path(sys.executable).parent / "scalellm")
PROMPT = "[INST] Hello! Who are you? [/INST]"


def run(*argv: str) -> None:
    """Print a command and run it; end the demo with its exit code when it fails."""
    shown = ["scalellm" if word == SCALELLM else "python" if word == sys.executable else word for word in argv]
    print(f"\n$ {shlex.join(shown)}", flush=True)
    code = subprocess.run(argv, cwd=ROOT, check=False).returncode
    if code:
        sys.exit(code)


def serve(work: Path, ports: list[str]) -> subprocess.Popen[str]:
    """Start ``scalellm serve`` and return once it says that Triton is ready."""
    argv = [SCALELLM, "serve", "--recipe", "tiny", "--work", str(work), *ports]
    print(f"\n$ {shlex.join(['scalellm', *argv[1:]])} &", flush=True)
    server = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    for line in server.stdout:
        print(line, end="", flush=True)
        if line.startswith("Ctrl-C"):
            return server
    sys.exit(server.wait() or 1)


def stop(server: subprocess.Popen[str]) -> None:
    """Stop the server as Ctrl-C would, and wait for it."""
    server.send_signal(signal.SIGINT)
    try:
        server.wait(timeout=60)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def parse() -> argparse.Namespace:
    """Where the demo's files go, and on which ports its server listens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(".demo/tiny-llama"), help="where the small Llama goes")
    parser.add_argument("--work", type=Path, default=Path("scalellm-work"), help="where the artifacts go")
    parser.add_argument("--http-port", default="8000")
    parser.add_argument("--grpc-port", default="8001")
    parser.add_argument("--metrics-port", default="8002")
    return parser.parse_args()


def main() -> None:
    """The demo, step by step."""
    given = parse()
    clients = ["--http-port", given.http_port, "--grpc-port", given.grpc_port]
    run(sys.executable, "scripts/make_tiny_llama.py", str(given.model))
    run(SCALELLM, "build", "--recipe", "tiny", "--model", str(given.model), "--work", str(given.work))
    server = serve(given.work, [*clients, "--metrics-port", given.metrics_port])
    try:
        run(SCALELLM, "infer", PROMPT, "--protocol", "http", "--max-tokens", "48", *clients)
        run(SCALELLM, "infer", PROMPT, "--protocol", "grpc", "--stream", "--max-tokens", "48", *clients)
    finally:
        stop(server)
    print("\nWhere everything lies:")
    for path, what in (
        (given.model, "the small Llama, as transformers would load it"),
        (given.work / "tiny/checkpoint", "quantized, in the unified Hugging Face layout"),
        (given.work / "tiny/engine", "the CPU engine and its passport (engine.json)"),
        (given.work / "tiny/repository", "the Triton model repository"),
    ):
        print(f"  {path!s:<32} {what}")
    print("\nServe it yourself:  make serve")
    print("Your own model:     .venv/bin/scalellm build --recipe cpu --model DIR   (or rtx4090, l4, t4, a100, h100)")


if __name__ == "__main__":
    main()
