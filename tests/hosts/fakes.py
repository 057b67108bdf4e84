"""Programs that stand for those of a GPU machine: they write down how they were called and leave what real ones leave.

One source under several names, in a folder that a test puts on PATH. What they show and how they end stands in a file
beside them, ``behavior.json``, because a container or a login does not pass the environment on.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from toolchain.device import device
from toolchain.host import EngineJob
from toolchain.release import releases

RTX4090 = "0, NVIDIA GeForce RTX 4090, GPU-4090, 8.9, 595.10.02, 24564, 24000"
L4 = "1, NVIDIA L4, GPU-4, 8.9, 595.10.02, 23034, 22000"
A100 = "0, NVIDIA A100-SXM4-80GB, GPU-100, 8.0, 535.161.08, 81920, 81000"

SOURCE = '''
import json, os, shutil, socket, subprocess, sys, time
from pathlib import Path

here = Path(__file__).parent
name, args = Path(sys.argv[0]).name, sys.argv[1:]
behavior = json.loads((here / "behavior.json").read_text())
call = {"program": name, "argv": args, "env": dict(os.environ), "cwd": os.getcwd()}
descriptor = os.open(here / "calls.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
os.write(descriptor, (json.dumps(call) + "\\n").encode())

def build(args):
    """What trtllm-build does: config.json and a file for each rank, a timing cache in the working folder."""
    flags = dict(zip(args[::2], args[1::2]))
    for line in behavior["says"]:
        print(line, flush=True)
    if behavior["sleep_s"]:
        if behavior["sleep_s"] > 100:
            subprocess.Popen(["sleep", "300"])
        time.sleep(behavior["sleep_s"])
    if behavior["exit"]:
        sys.exit(behavior["exit"])
    config = json.loads(Path(flags["--checkpoint_dir"], "config.json").read_text())
    out = Path(flags["--output_dir"])
    out.mkdir(exist_ok=True)
    (out / "config.json").write_text(json.dumps({"version": behavior["version"], "pretrained_config": config}))
    for rank in range(int(flags.get("--workers", 1))):
        (out / f"rank{rank}.engine").write_bytes(b"engine of rank %d" % rank)
    Path("model.cache").write_bytes(b"timing")

def container(args):
    if args[0] == "info":
        print("Client: a fake")
        if behavior["info_error"]:
            print(behavior["info_error"], file=sys.stderr)
            sys.exit(1)
    elif args[:2] == ["image", "inspect"]:
        sys.exit(0 if args[2] in behavior["images"] else 1)
    elif args[0] == "run":
        mounts = {}
        for arg in args:
            if arg.startswith("--volume="):
                source, target, *mode = arg.removeprefix("--volume=").split(":")
                mounts[target] = (source, mode)
        at = next(index for index, arg in enumerate(args) if index and not arg.startswith("--"))
        inside = args[at + 1:]
        if args[at] not in behavior["images"]:
            print(f"docker: Error response from daemon: No such image: {args[at]}.", file=sys.stderr)
            sys.exit(125)
        assert inside[0] == "trtllm-build" and mounts["/checkpoint"][1] == ["ro"] and not mounts["/engine"][1], mounts
        os.chdir("/tmp" if "--workdir=/tmp" in args else "/")
        build([mounts.get(word, (word,))[0] for word in inside[1:]])

def ssh(args):
    """Hands the command to the test's own ``Sshd``, prints what comes back, and exits as the command does."""
    words = args[args.index("--") + 1:]
    if behavior["refuse"]:
        print(behavior["refuse"], file=sys.stderr)
        sys.exit(255)
    with socket.socket(socket.AF_UNIX) as wire:
        wire.connect(str(here / "sshd.sock"))
        answers = wire.makefile("rw")
        answers.write(json.dumps({"host": words[0], "command": " ".join(words[1:])}) + "\\n")
        answers.flush()
        for answer in map(json.loads, answers):
            if "exit" in answer:
                sys.exit(answer["exit"])
            print(answer["line"], file=sys.stderr if answer["error"] else sys.stdout, flush=True)
            dropped = here / "dropped"
            if behavior["drop_at"] and behavior["drop_at"] in answer["line"] and not dropped.exists():
                dropped.touch()
                break
    print("client_loop: send disconnect: Broken pipe", file=sys.stderr)
    sys.exit(255)

def rsync(args):
    """Copies what differs in size or time; where it is told to, it drops the connection inside the second file."""
    ends = [Path(behavior["home"], end.partition(":")[2]) if ":" in end else Path(end) for end in args[-2:]]
    files, copied, dropped = sorted(ends[0].iterdir()), 0, here / "dropped"
    total = sum(file.stat().st_size for file in files)
    for file in files:
        there = ends[1] / file.name
        if there.exists() and there.stat().st_size == file.stat().st_size and int(there.stat().st_mtime) == int(
            file.stat().st_mtime
        ):
            continue
        if behavior["rsync_drops"] and copied and not dropped.exists():
            dropped.touch()
            there.write_bytes(file.read_bytes()[:100])
            print("rsync: connection unexpectedly closed (12345 bytes received so far) [sender]", file=sys.stderr)
            sys.exit(12)
        shutil.copy2(file, there)
        copied += file.stat().st_size
        print(f"\\r{copied:>15,} {100 * copied // total}%  100.00MB/s    0:00:01 ", end="", flush=True)
        with (here / "copied").open("a") as stream:
            stream.write(f"{file.name}\\n")
    print()

def sky(args):
    """Rents nothing: the task runs here, with ``home`` for the home of the rented machine."""
    home = Path(behavior["home"])
    if args[0] == "check":
        if behavior["refuse"]:
            print(behavior["refuse"], file=sys.stderr)
            sys.exit(1)
        print(json.dumps({"default": behavior["clouds"]}))
    elif args[0] == "launch":
        import yaml
        task = yaml.safe_load(Path(args[-1]).read_text())
        for target, source in task["file_mounts"].items():
            shutil.copytree(source, home / target.removeprefix("~/"))
        print(f"(scalellm, pid=2345) on {task['resources']['accelerators']}", flush=True)
        env = {**os.environ, "HOME": str(home)}
        done = subprocess.run(["bash", "-c", task["run"]], env=env)
        sys.exit(100 if done.returncode else 0)

if name == "trtllm-build":
    build(args)
elif name == "nvidia-smi":
    print("\\n".join(behavior["gpus"]))
    sys.exit(0 if any(", " in line for line in behavior["gpus"]) else 9)
elif name in ("docker", "podman"):
    container(args)
elif name == "ssh":
    ssh(args)
elif name == "rsync":
    rsync(args)
elif name == "sky":
    sky(args)
'''


class Programs:
    """A folder of fake programs."""

    def __init__(self, folder: Path, *names: str, version: str = "1.2.1", gpus: tuple[str, ...] = (RTX4090,)) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        for name in names:
            program = folder / name
            program.write_text(f"#!{sys.executable}\n{SOURCE}")
            program.chmod(0o755)
        self.site = folder / "site"
        metadata = self.site / f"tensorrt_llm-{version}.dist-info" / "METADATA"
        metadata.parent.mkdir(parents=True)
        metadata.write_text(f"Metadata-Version: 2.1\nName: tensorrt_llm\nVersion: {version}\n")
        self._behavior: dict[str, Any] = {
            "gpus": list(gpus),
            "version": version,
            "says": [],
            "exit": 0,
            "sleep_s": 0,
            "info_error": "",
            "images": [],
            "refuse": "",
            "home": "",
            "drop_at": "",
            "clouds": [],
            "rsync_drops": False,
        }
        self.behave()

    def behave(self, **changes: Any) -> None:
        """What the programs show and how they end from now on."""
        self._behavior |= changes
        temporary = self.folder / "behavior.tmp"
        temporary.write_text(json.dumps(self._behavior))
        temporary.replace(self.folder / "behavior.json")

    def calls(self, program: str) -> list[dict[str, Any]]:
        """How a program was called, in order: argv, env, cwd."""
        file = self.folder / "calls.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return [call for call in map(json.loads, lines) if call["program"] == program]

    @property
    def path(self) -> str:
        """PATH with these programs first, and without the machine's own docker."""
        return os.pathsep.join([str(self.folder), "/usr/bin", "/bin"])

    @property
    def environment(self) -> dict[str, str]:
        """What makes a process use these programs."""
        known = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
        return {"PATH": self.path, "PYTHONPATH": os.pathsep.join([str(self.site), *known])}


def make_job(folder: Path, *, version: str = "1.2.1", gpus: int = 1, kind: str = "rtx4090") -> EngineJob:
    """A job with a small TensorRT-LLM checkpoint in ``folder``."""
    checkpoint, out = folder / "trtllm checkpoint", folder / "engine.partial"
    checkpoint.mkdir(parents=True, exist_ok=True)
    out.mkdir(exist_ok=True)
    (checkpoint / "config.json").write_text(json.dumps({"architecture": "LlamaForCausalLM"}))
    for rank in range(gpus):
        (checkpoint / f"rank{rank}.safetensors").write_bytes(bytes([rank]) * 5000)

    def argv(source: str, target: str) -> tuple[str, ...]:
        flags = ("--checkpoint_dir", source, "--output_dir", target, "--workers", str(gpus))
        return ("trtllm-build", *flags, "--gemm_plugin", "auto")

    release = releases()[version]
    return EngineJob("rtx4090", release, device(kind), gpus, checkpoint, out, argv, "5f2c0a91d3e4" + "0" * 52)
