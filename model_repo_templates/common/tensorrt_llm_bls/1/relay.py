"""One client's request on its way to the engine, and its text on the way back."""

from __future__ import annotations

import threading
import uuid
from contextlib import suppress
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from answers import Answers
from detokenizer import Anchor
from doors import Door, as_tensors
from failed import FailedError
from speculation import Drafts, Speculation, tokens_to_draft
from tensors import RefusedError, read, scalar, strings
from tokenizer import Tokenizer
from wiring import NEWEST, EngineNames, to_engine, to_preprocessing, wanted_outputs

_FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class Setting:
    """What all requests share."""

    def __init__(
        self, tokenizer: Tokenizer, door: Door, parameters: dict[str, str], drafts: Drafts | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.anchor = Anchor(tokenizer)
        self.door = door
        self.engine = EngineNames.of(parameters)
        self.drafts = drafts
        self.skip_special = parameters["skip_special_tokens"].lower() in {"true", "1", "yes"}
        self.exclude_input = parameters["exclude_input_in_output"].lower() in {"true", "1", "yes"}


class Relay:
    """Runs in a thread of its own (``run``); ``look_after`` is called from the housekeeping thread."""

    def __init__(self, request: Any, setting: Setting) -> None:
        self._setting = setting
        self._sender = request.get_response_sender()
        self._wanted = set(request.requested_output_names())
        self._inputs = read(request)
        self._id = f"bls-{uuid.uuid4()}"
        """The engine's requests need ids that no client can repeat: ``stop`` goes by them."""
        self._lock = threading.Lock()
        self._done = False
        self._cancelled = False
        self._engine_busy = False
        self._engine: Door | Speculation = setting.door
        self._drafts = False

    def run(self) -> None:
        """Answer the request: responses, then exactly one that is final."""
        try:
            self._relay()
        except RefusedError as refused:
            self.fail(str(refused), "INVALID_ARG")
        except FailedError as failed:
            self.fail(failed.message, failed.code)
        except Exception as error:  # Whatever it is, the client must not wait for ever.
            self.fail(f"{type(error).__name__}: {error}", "INTERNAL")

    def look_after(self) -> None:
        """When the client has gone, stop the engine's request; ``run`` then ends by itself. Said again each time until
        it does: the engine may not have heard of the request yet."""
        with self._lock:
            if self._done or not self._engine_busy or not self._sender.is_cancelled():
                return
            self._cancelled = True
        with suppress(FailedError):
            self._engine.stop(self._id)

    def fail(self, message: str, code: str | int) -> None:
        """The final response is an error."""
        number = getattr(pb_utils.TritonError, code) if isinstance(code, str) else code
        self._send(pb_utils.InferenceResponse(error=pb_utils.TritonError(message, number)), _FINAL)

    def _relay(self) -> None:
        inputs, setting = self._inputs, self._setting
        prepared = setting.door.prepare(to_preprocessing(inputs))
        stop_words = strings(inputs.get("stop_words"))
        streaming = bool(scalar(inputs, "stream", False))
        piecewise = streaming or (bool(stop_words) and scalar(inputs, "beam_width", 1) == 1)
        answers = Answers(setting.tokenizer, setting.anchor, stop_words, setting.skip_special)
        engine = NEWEST if setting.drafts else setting.engine
        tensors = to_engine(inputs, prepared, streaming=piecewise, engine=engine)
        tokens = tokens_to_draft(inputs, tensors, setting.drafts)
        self._drafts = tokens > 0
        if setting.drafts:
            self._engine = Speculation(setting.door, setting.drafts, tokens, setting.engine.inputs)
        self._follow(answers, tensors, streaming)
        if self._cancelled:
            raise FailedError("the client cancelled this request", "CANCELLED")
        answers.finish()
        self._send_rest(answers, streaming, prepared)

    def _follow(self, answers: Answers, tensors: dict[str, np.ndarray], streaming: bool) -> None:
        """Take the engine's responses as they come; stop it when every sequence has met a stop word."""
        engine, stopped = self._engine, False
        self._engine_busy = True
        for outputs in engine.generate(self._id, tensors, wanted_outputs(self._inputs, self._setting.engine)):
            index = answers.push(outputs)
            if answers.all_stopped and not stopped:
                stopped = True
                engine.stop(self._id)
            if streaming:
                self._send_piece(*answers.take(index))
        self._engine_busy = False

    def _prompt_text(self, prepared: dict[str, np.ndarray]) -> str:
        if scalar(self._inputs, "exclude_input_in_output", self._setting.exclude_input):
            return ""
        return self._setting.tokenizer.decode(prepared["INPUT_ID"].reshape(-1).tolist())

    def _send_piece(self, texts: list[str], extra: dict[str, np.ndarray]) -> None:
        if any(texts) or "output_log_probs" in extra:
            self._send(self._response(texts, extra), 0)

    def _send_rest(self, answers: Answers, streaming: bool, prepared: dict[str, np.ndarray]) -> None:
        """The last responses, one a sequence. Without any text left, a stream ends with the bare flag, unless
        ``return_num_output_tokens`` asks how each sequence ended, or drafts were used: the last step's draft is counted
        in it. The prompt's tokens are counted here, because not every release's engine does it.
        """
        inputs, prompt = self._inputs, "" if streaming else self._prompt_text(prepared)
        told, counts = scalar(inputs, "return_num_output_tokens", False), {}
        if scalar(inputs, "return_num_input_tokens", False):
            counts["num_input_tokens"] = prepared["REQUEST_INPUT_LEN"].astype(np.int32)
        for index in answers.indices:
            texts, extra = answers.take(index)
            ending = answers.summary(index, scalar(inputs, "max_tokens", 0), scalar(prepared, "OUT_END_ID", -1))
            ending = {**counts, **ending} if told else counts
            if any(texts) or told or self._drafts or not streaming:
                self._send(self._response([prompt + text for text in texts], {**ending, **extra}), 0)
        self._send(None, _FINAL)

    def _response(self, texts: list[str], extra: dict[str, np.ndarray]) -> Any:
        """Only what the client asked for: Triton 2.51 frees the rest without holding Python's lock."""
        text_output = np.array([text.encode("utf-8") for text in texts], dtype=object)
        tensors = {"text_output": text_output, **extra}
        return pb_utils.InferenceResponse(
            as_tensors({name: array for name, array in tensors.items() if name in self._wanted})
        )

    def _send(self, response: Any, flags: int) -> None:
        with self._lock:
            self._done = self._done or flags == _FINAL
            if response is None:
                self._sender.send(flags=flags)
            else:
                self._sender.send(response, flags=flags)
