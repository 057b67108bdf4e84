"""The head of a test's endpoint, as a process of its own: servers, door, front; every node gets as many replicas as it
has room for. ``python -m tests.fleet.head_process TOLD.json``, until SIGTERM.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.gateway.behind_gateway import settings_for
from toolchain.errors import EndpointError
from toolchain.fleet.board import Board
from toolchain.fleet.front.front import engines
from toolchain.fleet.front.texts import Parameters, Texts
from toolchain.fleet.hosts import door, packages
from toolchain.fleet.hosts.network import Addresses, Guests, serving
from toolchain.fleet.worker.membership import TOKENIZER, checked_passport, identity
from toolchain.gateway.logs import Log
from toolchain.gateway.run import Listen, background
from toolchain.registry import Folder
from toolchain.repository import Repository

ENDPOINT = "parrot"
PORTS = {"openai": 8080, "predict": 2345, "door": 7600, "etcd": 7601, "nats": 7602, "answers": 7603}


class Notes:
    """Satisfies what is used of ``Progress``: lines on standard output."""

    def note(self, text: str) -> None:
        print(text, flush=True)

    def task(self, label: str, total: int, unit: str) -> Any:
        from toolchain.progress import Silent

        return Silent().task(label, total, unit)


def version_of(repository: Path, folder: Path, notes: Any) -> dict[str, Any]:
    """What the board says of the one version that there is."""
    registry = str(folder / "registry")
    package = packages.offer(repository, ENDPOINT, "cpu", Folder(folder / "shelf"), registry, notes)
    return {
        "version": 1,
        "lane": ENDPOINT,
        "identity": identity(checked_passport(repository, "")),
        "drain_seconds": 5,
        "start_seconds": 60,
        "conformance": False,
        "allow_unverified": True,
        packages.PACKAGES: [package],
        packages.REGISTRY: registry,
    }


def assign(board: Board, until: threading.Event) -> None:
    """Every node that is seen gets its replicas, once."""
    known: set[str] = set()
    while not until.wait(0.2):
        try:
            for key, said in board.read("nodes/").items():
                node = key.removeprefix("nodes/")
                if node not in known:
                    names = [f"{node}-{number}" for number in range(int(said["room"]))]
                    wanted = [{"name": name, "version": 1} for name in names]
                    board.put(f"assigned/{node}", {"replicas": wanted})
                    known.add(node)
        except EndpointError as error:
            print(error.message, flush=True)


def main() -> None:
    told = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    folder, repository, host = Path(told["folder"]), Path(told["repository"]), str(told["host"])
    asked, notes = threading.Event(), Notes()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: asked.set())
    where = Addresses(host, PORTS["door"], PORTS["etcd"], PORTS["nats"], PORTS["answers"])
    guests = Guests(folder / "network", ENDPOINT, where)
    texts = Texts(repository / TOKENIZER, Parameters.of(Repository.open(repository).parameters))
    settings = settings_for(Path(told["tokenizer"]))
    settings = replace(settings, timeouts=replace(settings.timeouts, patience_s=40, first_token_s=60))
    listen = Listen(host, PORTS["openai"], PORTS["predict"], insecure_open=True)
    with serving(guests, notes), door.opened(guests, notes):
        board = guests.board()
        board.put("spec", {"versions": [version_of(repository, folder, notes)], "current": 1, "next": None})
        assigning = threading.Thread(target=assign, args=(board, asked))
        assigning.start()
        with background(settings, listen, log=Log(sys.stderr), engines=engines(guests.plane, texts, 200)):
            (folder / "token").write_text(str(guests.token(lives_s=600, uses=3)), encoding="ascii")
            print("ready", flush=True)
            asked.wait()
        assigning.join()


if __name__ == "__main__":
    main()
