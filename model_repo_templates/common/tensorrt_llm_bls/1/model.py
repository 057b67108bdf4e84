"""Triton model ``tensorrt_llm_bls``: text to text, the door for streaming.

It remembers what it has decoded, so that a stream has no half characters and no lost spaces, and it finds stop words in
the text, wherever the tokens begin and end. One instance serves many requests, each in a thread of its own that mostly
waits; one more thread looks every 0.2 s whose client has gone. The same files serve NVIDIA's ``tensorrtllm`` backend.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from doors import BlsDoor, Door, LineDoor
from http_door import HttpDoor, own_address
from prompts import Prompts
from relay import Relay, Setting
from speculation import Drafts
from tensors import refuse_unsound_numpy, settings
from tokenizer import Tokenizer

_POLL_S = 0.2


class TritonPythonModel:
    """The one instance of the model."""

    def initialize(self, args: dict[str, str]) -> None:
        refuse_unsound_numpy()
        parameters, folder = settings(args)
        tokenizer = Tokenizer(folder)
        door = _door(parameters["tensorrt_llm_model_name"], tokenizer, parameters)
        self._setting = Setting(tokenizer, door, parameters, _drafts(tokenizer, parameters))
        self._limit = int(parameters["max_concurrent_requests"])
        self._pool = ThreadPoolExecutor(self._limit, thread_name_prefix="relay")
        self._relays: set[Relay] = set()
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._housekeeper = threading.Thread(target=self._keep_house, name="housekeeping", daemon=True)
        self._housekeeper.start()

    def execute(self, requests: list[Any]) -> None:
        """Hand each request to a thread; the answers follow later."""
        for request in requests:
            relay = Relay(request, self._setting)
            with self._lock:
                full = len(self._relays) >= self._limit
                if not full:
                    self._relays.add(relay)
            if full:
                text = f"{self._limit} requests are running or waiting, and this server takes no more: try again later"
                relay.fail(text, "UNAVAILABLE")
            else:
                self._pool.submit(self._run, relay)

    def finalize(self) -> None:
        """Called by Triton after all responses are final."""
        self._closing.set()
        self._housekeeper.join()
        self._pool.shutdown()

    def _run(self, relay: Relay) -> None:
        try:
            relay.run()
        finally:
            with self._lock:
                self._relays.discard(relay)

    def _keep_house(self) -> None:
        while not self._closing.wait(_POLL_S):
            with self._lock:
                relays = list(self._relays)
            for relay in relays:
                relay.look_after()


def _door(engine: str, tokenizer: Tokenizer, parameters: dict[str, str]) -> Door:
    """The way to an engine, or to its draft."""
    address = own_address() if parameters["engine_door"] == "http" else None
    if parameters["engine_door"] != "line" and address is None:
        return BlsDoor(engine)
    prompts = Prompts(
        tokenizer,
        max_input_len=int(parameters["max_input_len"]),
        special=parameters["add_special_tokens"].lower() in {"true", "1", "yes"},
        vocab_size=int(parameters["vocab_size"]),
    )
    return HttpDoor(engine, prompts, address) if address else LineDoor(engine, prompts)


def _drafts(tokenizer: Tokenizer, parameters: dict[str, str]) -> Drafts | None:
    """The draft engine, where the repository has one."""
    name = parameters["tensorrt_llm_draft_model_name"]
    if not name:
        return None
    tokens, longest = int(parameters["num_draft_tokens"]), int(parameters["draft_max_seq_len"])
    return Drafts(_door(name, tokenizer, parameters), tokens, longest)
