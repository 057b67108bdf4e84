"""A GPU machine behind ssh: the checkpoint goes there, the engine is built there and comes back.

There the builder is ``trtllm-build`` on PATH where it is of the plan's release, else a container of its image. rsync
carries the files: it skips what is there, goes on inside a file that was cut off, and checks what it sends. The
builder is detached from the connection and leaves its exit code in a file, so that a connection that drops, or a
scalellm that is killed, loses nothing: whoever runs the same build again finds it by the engine's key and follows it.

Host keys are always checked and no password is ever asked for. What the user's ssh config says of the host holds.
"""

from __future__ import annotations

import re
import shlex
import shutil
import time
from pathlib import Path

from toolchain import runner
from toolchain.errors import ToolError
from toolchain.host import EngineJob, HostCommand
from toolchain.hosts import machine, probe, watching
from toolchain.hosts.command import container_argv, gpus_of, read_gpus, run_name, size_of, with_gpus
from toolchain.progress import Progress

WAITS_S = (2.0, 5.0, 15.0, 30.0, 60.0)
"""How long to wait before each new attempt after the connection dropped."""

_TARGET = re.compile(r"(?P<host>(?:[A-Za-z0-9._][A-Za-z0-9._-]*@)?[A-Za-z0-9._][A-Za-z0-9._-]*)(?:/(?P<gpus>.*))?")
_BRIEF_S = 120.0
_DROPPED = frozenset({10, 12, 30, 35, 255})
"""ssh(1): 255. rsync(1): socket, protocol stream, and the two time-outs."""

_REFUSED = {
    "Host key verification failed": "ssh {host}   # once by hand: compare the key that it shows, then accept it",
    "IDENTIFICATION HAS CHANGED": "ssh {host}   # by hand: another machine answers, or it was installed again",
    "Permission denied": "ssh-copy-id {host}   # or: ssh-add, where the key has a passphrase",
    "Could not resolve hostname": "ssh {host}   # by hand: the name is not known, see ~/.ssh/config",
    "Connection refused": "ssh {host}   # by hand: nothing listens there",
    "Connection timed out": "ssh {host}   # by hand: it does not answer, see its address and the firewall",
}
"""What OpenSSH says when it will not work the next time either -> what to do."""


class Ssh:
    """``host`` is what ssh takes: a name of ~/.ssh/config, or USER@HOST. ``gpus``: those to use there."""

    def __init__(self, host: str, gpus: tuple[str, ...] = ()) -> None:
        self.host, self.gpus = host, gpus
        self.name = f"ssh:{host}" + (f"/{','.join(gpus)}" if gpus else "")

    def lacks(self, job: EngineJob) -> tuple[str, ...]:
        missing = tuple(f"{tool} on this machine" for tool in ("ssh", "rsync") if shutil.which(tool) is None)
        if missing:
            return missing
        done = probe.ask(self._ssh(shlex.join(probe.command(folder(job), job.release.image))), self.host)
        if done.exit_code:
            return (f"a connection to {self.host}: {_last(done.stderr)}. Try: {self._mend(done.stderr)}",)
        found = probe.parse(done.stdout)
        builder = machine.without_builder(found, job)
        container = machine.without_container(found, job, found.engine()) if builder else []
        rsync = [] if found.rsync else [f"rsync on {self.host}: sudo apt-get install rsync"]
        return (
            *machine.without_gpus(found, job, self._seen(found, job, bool(builder)), on=f"ssh:{self.host}/"),
            *(["one of these two:", *(f"  {line}" for line in (*builder, *container))] if container else []),
            *machine.without_room(found, job, copies=2),
            *rsync,
        )

    def commands(self, job: EngineJob) -> tuple[HostCommand, ...]:
        here, there = "this machine", self.host
        place = folder(job)
        return (
            HostCommand("a folder for the build", there, self._ssh(f"mkdir -p {place}/checkpoint {place}/engine")),
            HostCommand("the checkpoint, sent", here, self._rsync(job.checkpoint, f"{self.host}:{place}/checkpoint/")),
            HostCommand("the engine, built", there, self._ssh(shlex.join(["sh", "-c", self.script(job)]))),
            HostCommand("the engine, fetched", here, self._rsync(f"{self.host}:{place}/engine/", job.out)),
            HostCommand("the folder, removed", there, self._ssh(f"rm -rf {place}")),
        )

    def build(self, job: EngineJob, log: Path, progress: Progress) -> None:
        make, send, run, fetch, remove = self.commands(job)
        watching.fresh(log)
        self._briefly(make, job, log)
        self._carry(send, size_of(job.checkpoint), job, log, progress, f"send the checkpoint to {self.host}")
        progress.note(f"The build on {self.host} goes on should this end; the same command takes it up again.")
        self._follow(run, job, log, progress)
        self._carry(fetch, size_of(job.checkpoint), job, log, progress, f"fetch the engine from {self.host}")
        self._briefly(remove, job, log)

    def script(self, job: EngineJob) -> str:
        """Start the build unless it runs or is done, follow its log to the end, and exit as it did.

        255 is what ssh itself exits with, so the builder's own becomes 1. A builder that left no code was killed: 137.
        """
        name = run_name(job)
        return f"""cd {folder(job)} || exit 66
if grep -qs {name} "/proc/$(cat pid 2> /dev/null)/cmdline"; then
  echo "scalellm: this build runs already, here is its log"
elif [ "$(cat code 2> /dev/null)" != 0 ] || [ ! -s engine/config.json ]; then
  rm -rf engine code
  mkdir engine
  cat > build.sh << 'END'
{self._builder(job)}
END
  : > build.log
  setsid nohup sh build.sh {name} >> build.log 2>&1 < /dev/null &
  echo $! > pid
fi
tail -n +1 -s 0.5 -f --pid="$(cat pid)" build.log
code=$(cat code 2> /dev/null || echo 137)
if [ "$code" = 255 ]; then code=1; fi
exit "$code"
"""

    def _builder(self, job: EngineJob) -> str:
        """What runs detached: the first builder that is of the release; its exit code goes into the file ``code``."""
        version, pinned, name = job.release.version, job.release.image, run_name(job)
        own = shlex.join(with_gpus(job.argv("@HERE@/checkpoint", "@HERE@/engine"), self.gpus))
        docker, podman = (_container(tool, job, gpus_of(job, self.gpus)) for tool in ("docker", "podman"))
        script = f"""{machine.VERSION.strip()}
here=$PWD
empty=$(mktemp -d) && cd "$empty"
case $(trtllm_version 2> /dev/null) in
{version} | {version}.post* | {version}+*) {own} ;;
*)
  if docker image inspect {pinned} > /dev/null 2>&1; then
    docker rm --force {name} > /dev/null 2>&1
    {docker}
  else
    podman rm --force {name} > /dev/null 2>&1
    {podman}
  fi ;;
esac
echo $? > "$here"/code.part
mv "$here"/code.part "$here"/code
rm -rf "$empty\""""
        return script.replace("@HERE@", '"$here"')

    def _follow(self, run: HostCommand, job: EngineJob, log: Path, progress: Progress) -> None:
        """Build, and take it up again after a dropped connection; the log always holds the whole of it once."""
        begin = log.stat().st_size
        for wait_s in (*WAITS_S, None):
            with log.open("ab") as stream:
                stream.truncate(begin)
            code = watching.build(run.argv, job, log, progress, on=self.name)
            if not self._again(code, log, wait_s, progress):
                break
        if code:
            left = f"ssh {self.host} rm -rf {folder(job)}   # where its checkpoint waits for the next attempt"
            self._fail(code, job, log, f"trtllm-build on {self.host}", left)

    def _carry(
        self, command: HostCommand, nbytes: int, job: EngineJob, log: Path, progress: Progress, label: str
    ) -> None:
        for wait_s in (*WAITS_S, None):
            code = watching.transfer(command.argv, nbytes, log, progress, label)
            if not self._again(code, log, wait_s, progress):
                break
        if code:
            self._fail(code, job, log, f"rsync with {self.host}", "")

    def _briefly(self, command: HostCommand, job: EngineJob, log: Path) -> None:
        done = runner.run(command.argv, timeout_s=_BRIEF_S, check=False)
        if done.exit_code:
            watching.append(log, done.stderr)
            self._fail(done.exit_code, job, log, f"{self.host}, {command.says},", "")

    def _again(self, code: int, log: Path, wait_s: float | None, progress: Progress) -> bool:
        """Whether to try once more: the connection dropped, and nothing says that it would be refused again."""
        if code not in _DROPPED or wait_s is None or any(words in runner.tail(log) for words in _REFUSED):
            return False
        progress.note(f"The connection to {self.host} dropped; again in {wait_s:g} s")
        time.sleep(wait_s)
        return True

    def _fail(self, code: int, job: EngineJob, log: Path, what: str, hint: str) -> None:
        mend = self._mend(runner.tail(log)) if code in _DROPPED else hint
        raise watching.failure((), code, job, log, what=what, hint=mend)

    def _mend(self, said: str) -> str:
        known = (advice for words, advice in _REFUSED.items() if words in said)
        return next(known, "ssh {host}   # by hand").format(host=self.host)

    def _seen(self, found: probe.Machine, job: EngineJob, contained: bool) -> tuple[str, ...] | None:
        return gpus_of(job, self.gpus) if contained or self.gpus else None

    def _ssh(self, command: str) -> tuple[str, ...]:
        return probe.over_ssh(self.host, command)

    def _rsync(self, source: Path | str, target: Path | str) -> tuple[str, ...]:
        """A folder's content into another; a folder of this machine comes as a Path."""
        ends = [f"{end.absolute()}/" if isinstance(end, Path) else end for end in (source, target)]
        shell = shlex.join(["ssh", *probe.ssh_options()])
        return ("rsync", "--recursive", "--times", "--partial", "--info=progress2", f"--rsh={shell}", "--", *ends)


def folder(job: EngineJob) -> str:
    """Where a build lies on the other machine, seen from its user's home."""
    return f".cache/scalellm/builds/{job.key}"


def _container(tool: str, job: EngineJob, gpus: tuple[str, ...]) -> str:
    """A line of shell: what only the other machine knows, it fills in."""
    argv = container_argv(
        tool, job, checkpoint="@HERE@/checkpoint", out="@HERE@/engine", user="@USER@", gpus=gpus, keep_id=True
    )
    line = shlex.join(argv).replace("@USER@", '"$(id -u):$(id -g)"')
    return line.replace("--userns=keep-id", '$([ "$(id -u)" = 0 ] || echo --userns=keep-id)')


def _last(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no reason given")


def connect(target: str) -> Ssh:
    """``target`` is what follows the colon of ``--on``: ``"gpu-box"``, ``"me@gpu-box/1"``. Raises ToolError."""
    found = _TARGET.fullmatch(target)
    if not found:
        raise ToolError(
            f"--on ssh:{target}: no name of a host", hint="--on ssh:USER@HOST, with GPUs: ssh:USER@HOST/0,1"
        )
    gpus = found["gpus"]
    return Ssh(found["host"], read_gpus(gpus, f"ssh:{target}") if gpus is not None else ())
