"""The other end of the fake ``ssh``: a thread that runs commands as a login does, and is no child of the client.

So a client that is killed, or whose connection drops, ends the command that it began, and nothing that the command
detached from itself; as with a real sshd.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any


class Sshd:
    """Listens on a socket in the folder of the fake programs; ``home`` is where its logins are."""

    def __init__(self, programs: Path, home: Path, environment: Mapping[str, str], greeting: str = "") -> None:
        self.home, self.greeting = home, greeting
        self.hosts: list[str] = []
        self._environment = {**environment, "HOME": str(home), "USER": "builder"}
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(programs / "sshd.sock"))
        self._socket.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._socket.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                wire, _ = self._socket.accept()
                threading.Thread(target=self._login, args=(wire,), daemon=True).start()

    def _login(self, wire: socket.socket) -> None:
        with contextlib.suppress(OSError), wire, wire.makefile("rw") as stream:
            asked = json.loads(stream.readline())
            self.hosts.append(asked["host"])
            lock = threading.Lock()

            def answer(**words: Any) -> None:
                with lock:
                    stream.write(json.dumps(words) + "\n")
                    stream.flush()

            def relay(pipe: IO[str], error: bool) -> None:
                with contextlib.suppress(OSError, ValueError):
                    for line in pipe:
                        answer(line=line.rstrip("\n"), error=error)

            if self.greeting:
                answer(line=self.greeting, error=False)
            with subprocess.Popen(
                ["sh", "-c", asked["command"]],
                cwd=self.home,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            ) as shell:
                assert shell.stdout is not None
                assert shell.stderr is not None
                pipes = [(shell.stdout, False), (shell.stderr, True)]
                readers = [threading.Thread(target=relay, args=pair, daemon=True) for pair in pipes]
                for reader in readers:
                    reader.start()
                threading.Thread(target=self._watch, args=(wire, shell), daemon=True).start()
                code = shell.wait()
                for reader in readers:
                    reader.join()
                with contextlib.suppress(OSError):
                    answer(exit=code)

    def _watch(self, wire: socket.socket, shell: subprocess.Popen[str]) -> None:
        """Ends the command's own session once the client is gone."""
        with contextlib.suppress(OSError):
            wire.recv(1, socket.MSG_PEEK)
        if shell.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGKILL)
