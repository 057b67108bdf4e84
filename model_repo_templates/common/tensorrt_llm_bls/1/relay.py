"""One client's request on its way through preprocessing and tensorrt_llm, and its text on the way back."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from answers import Answers
from detokenizer import Anchor
from tensors import RefusedError, read, scalar, strings
from tokenizer import Tokenizer
from wiring import PREPROCESSED, stop_request, to_engine, to_preprocessing, wanted_outputs

_FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class Setting:
    """What all requests share."""

    def __init__(self, tokenizer: Tokenizer, parameters: dict[str, str]) -> None:
        self.tokenizer = tokenizer
        self.anchor = Anchor(tokenizer)
        self.engine = parameters["tensorrt_llm_model_name"]
        self.skip_special = parameters["skip_special_tokens"].lower() in {"true", "1", "yes"}
        self.exclude_input = parameters["exclude_input_in_output"].lower() in {"true", "1", "yes"}


class Relay:
    """Runs in a thread of its own (``run``); ``look_after`` is called from the housekeeping thread."""

    def __init__(self, request: Any, setting: Setting) -> None:
        self._setting = setting
        self._sender = request.get_response_sender()
        self._inputs = read(request)
        self._id = f"bls-{uuid.uuid4()}"
        """The engine's requests need ids that no client can repeat: ``stop`` goes by them."""
        self._lock = threading.Lock()
        self._done = False
        self._cancelled = False
        self._stopped = False
        self._engine_busy = False

    def run(self) -> None:
        """Answer the request: responses, then exactly one that is final."""
        try:
            self._relay()
        except RefusedError as refused:
            self.fail(str(refused), pb_utils.TritonError.INVALID_ARG)
        except _FailedError as failed:
            self.fail(failed.message, failed.code)
        except Exception as error:  # Whatever it is, the client must not wait for ever.
            self.fail(f"{type(error).__name__}: {error}", pb_utils.TritonError.INTERNAL)

    def look_after(self) -> None:
        """When the client has gone, stop the engine's request; ``run`` then ends by itself."""
        with self._lock:
            if self._done or self._cancelled or not self._engine_busy or not self._sender.is_cancelled():
                return
            self._cancelled = True
        with suppress(_FailedError):
            self._stop_engine()

    def fail(self, message: str, code: int) -> None:
        """The final response is an error."""
        self._send(pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code)), _FINAL)

    def _relay(self) -> None:
        inputs = self._inputs
        prepared = self._prepare()
        stop_words = strings(inputs.get("stop_words"))
        streaming = bool(scalar(inputs, "stream", False))
        beams = int(scalar(inputs, "beam_width", 1))
        piecewise = streaming or (bool(stop_words) and beams == 1)
        setting = self._setting
        answers = Answers(setting.tokenizer, setting.anchor, stop_words, setting.skip_special)
        for tensors in self._generate(to_engine(inputs, prepared, streaming=piecewise), wanted_outputs(inputs)):
            index = answers.push(tensors)
            if answers.all_stopped and not self._stopped:
                self._stop_engine()
            if streaming:
                self._send_piece(*answers.take(index))
        if self._cancelled:
            raise _FailedError("the client cancelled this request", pb_utils.TritonError.CANCELLED)
        answers.finish()
        self._send_rest(answers, streaming, "" if streaming else self._prompt_text(prepared))

    def _prepare(self) -> dict[str, np.ndarray]:
        request = pb_utils.InferenceRequest(
            model_name="preprocessing",
            requested_output_names=list(PREPROCESSED),
            inputs=_as_tensors(to_preprocessing(self._inputs)),
        )
        return _outputs_of(request.exec())

    def _generate(self, tensors: dict[str, np.ndarray], wanted: list[str]) -> Iterator[dict[str, np.ndarray]]:
        """The engine's responses as numpy dictionaries."""
        request = pb_utils.InferenceRequest(
            model_name=self._setting.engine,
            request_id=self._id,
            requested_output_names=wanted,
            inputs=_as_tensors(tensors),
        )
        responses = request.exec(decoupled=True)
        self._engine_busy = True
        for response in responses:
            outputs = _outputs_of(response)
            if not outputs:
                self._explain_silence()
                break
            yield outputs
        self._engine_busy = False

    def _explain_silence(self) -> None:
        """A response without tensors. After a ``stop`` that is the end; else Triton 2.51 has dropped an error, which
        the engine is asked for again. Raises _FailedError."""
        if self._stopped:
            return
        self._stop_engine()
        raise _FailedError("the engine gave up in the middle of this answer", pb_utils.TritonError.INTERNAL)

    def _stop_engine(self) -> None:
        """Raises _FailedError when the engine is dead."""
        self._stopped = True
        request = pb_utils.InferenceRequest(
            model_name=self._setting.engine,
            request_id=self._id,
            requested_output_names=["output_ids"],
            inputs=_as_tensors(stop_request()),
        )
        for response in request.exec(decoupled=True):
            _outputs_of(response)

    def _prompt_text(self, prepared: dict[str, np.ndarray]) -> str:
        if scalar(self._inputs, "exclude_input_in_output", self._setting.exclude_input):
            return ""
        return self._setting.tokenizer.decode(prepared["INPUT_ID"].reshape(-1).tolist())

    def _send_piece(self, texts: list[str], extra: dict[str, np.ndarray]) -> None:
        if any(texts) or "output_log_probs" in extra:
            self._send(_response(texts, extra), 0)

    def _send_rest(self, answers: Answers, streaming: bool, prompt: str) -> None:
        """The last responses, one a sequence; without any text left, a stream ends with the bare flag."""
        pieces = [answers.take(index) for index in answers.indices]
        if streaming:
            pieces = [(texts, extra) for texts, extra in pieces if any(texts)]
        for texts, extra in pieces:
            self._send(_response([prompt + text for text in texts], extra), 0)
        self._send(None, _FINAL)

    def _send(self, response: Any, flags: int) -> None:
        with self._lock:
            self._done = self._done or flags == _FINAL
            if response is None:
                self._sender.send(flags=flags)
            else:
                self._sender.send(response, flags=flags)


class _FailedError(Exception):
    """A model behind this one answered with an error."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.message, self.code = message, code


def _as_tensors(tensors: dict[str, np.ndarray]) -> list[Any]:
    return [pb_utils.Tensor(name, np.ascontiguousarray(array)) for name, array in tensors.items()]


def _outputs_of(response: Any) -> dict[str, np.ndarray]:
    if response.has_error():
        error = response.error()
        raise _FailedError(error.message(), error.code())
    return {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}


def _response(texts: list[str], extra: dict[str, np.ndarray]) -> Any:
    output = pb_utils.Tensor("text_output", np.array([text.encode("utf-8") for text in texts], dtype=object))
    return pb_utils.InferenceResponse([output, *_as_tensors(extra)])
