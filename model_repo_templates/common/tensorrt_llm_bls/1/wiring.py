"""Which tensor of the client becomes which tensor of ``preprocessing`` and ``tensorrt_llm``. Plain numpy.

The same wiring as the ensemble's config.pbtxt. It knows nothing of Triton.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tensors import RefusedError, refuse, says_nothing, scalar

_IMAGES = "this model takes text only"
UNSUPPORTED = {
    "image_input": _IMAGES,
    "image_bytes_input": _IMAGES,
    "image_url_input": _IMAGES,
    "video_bytes_input": _IMAGES,
}
_TO_PREPROCESSING = {
    "QUERY": "text_input",
    "REQUEST_OUTPUT_LEN": "max_tokens",
    "BAD_WORDS_DICT": "bad_words",
    "STOP_WORDS_DICT": "stop_words",
    "EMBEDDING_BIAS_WORDS": "embedding_bias_words",
    "EMBEDDING_BIAS_WEIGHTS": "embedding_bias_weights",
    "END_ID": "end_id",
    "PAD_ID": "pad_id",
    "DECODER_QUERY": "decoder_text_input",
    "PROMPT_TABLE_EXTRA_ID": "prompt_table_extra_id",
}
_FROM_PREPROCESSING = {
    "input_ids": "INPUT_ID",
    "input_lengths": "REQUEST_INPUT_LEN",
    "request_output_len": "REQUEST_OUTPUT_LEN",
    "end_id": "OUT_END_ID",
    "pad_id": "OUT_PAD_ID",
    "stop_words_list": "STOP_WORDS_IDS",
    "bad_words_list": "BAD_WORDS_IDS",
    "embedding_bias": "EMBEDDING_BIAS",
}
PREPROCESSED = tuple(_FROM_PREPROCESSING.values())
_FROM_CLIENT = {
    "runtime_top_k": "top_k",
    "runtime_top_p": "top_p",
    "len_penalty": "length_penalty",
    **{
        name: name
        for name in (
            "temperature",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
            "min_tokens",
            "seed",
            "beam_width",
            "num_return_sequences",
            "return_log_probs",
            "return_context_logits",
            "return_generation_logits",
            "return_perf_metrics",
            "return_num_input_tokens",
            "return_num_output_tokens",
            "prompt_embedding_table",
            "prompt_vocab_size",
            "lora_task_id",
            "lora_weights",
            "lora_config",
            "guided_decoding_guide_type",
            "guided_decoding_guide",
        )
    },
}
_OUTPUTS_OF = {
    "return_log_probs": ("cum_log_probs", "output_log_probs"),
    "return_context_logits": ("context_logits",),
    "return_generation_logits": ("generation_logits",),
    "return_num_input_tokens": ("num_input_tokens",),
    "return_num_output_tokens": ("num_output_tokens",),
    "return_perf_metrics": (
        "kv_cache_alloc_new_blocks",
        "kv_cache_reused_blocks",
        "kv_cache_alloc_total_blocks",
        "arrival_time_ns",
        "first_scheduled_time_ns",
        "first_token_time_ns",
        "last_token_time_ns",
        "acceptance_rate",
        "total_accepted_draft_tokens",
        "total_draft_tokens",
    ),
}


@dataclass(frozen=True)
class EngineNames:
    """How the engine's ``tensorrt_llm`` differs from the newest one, whose names are used here."""

    release: str = ""
    renamed: tuple[tuple[str, str], ...] = ()
    """(newest name, the engine's name) of inputs."""
    lacks: frozenset[str] = frozenset()
    """Inputs and outputs, by their newest names."""

    @classmethod
    def of(cls, parameters: dict[str, str]) -> EngineNames:
        """From the model's parameters: words, and pairs as ``newest=here``."""
        pairs = tuple(pair.split("=", 1) for pair in parameters["engine_renamed"].split())
        lacks = frozenset(parameters["engine_lacks"].split())
        return cls(parameters["engine_release"], tuple((newest, here) for newest, here in pairs), lacks)

    def inputs(self, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Newest names -> the engine's. RefusedError for one that it lacks, unless it asks for nothing.

        ``exclude_input_in_output`` is left out: every engine here is told so by its configuration; and so is what
        ``tensorrt_llm_bls`` counts itself.
        """
        names = dict(self.renamed)
        found = {}
        for name, array in tensors.items():
            if name not in self.lacks:
                found[names.get(name, name)] = array
            elif name not in _NOT_NEEDED and not says_nothing(array, _NEUTRAL.get(name, 0.0)):
                raise RefusedError(f"{name}: the engine's release, {self.release}, does not have it")
        return found


_NOT_NEEDED = frozenset({"exclude_input_in_output", "return_num_input_tokens", "return_num_output_tokens"})
_NEUTRAL = {"num_return_sequences": 1.0}
"""Values besides zero that ask for nothing."""
NEWEST = EngineNames()


def to_preprocessing(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The client's tensors -> preprocessing's. Raises Refused for what this repository never takes."""
    refuse(inputs, UNSUPPORTED)
    return {name: inputs[source] for name, source in _TO_PREPROCESSING.items() if source in inputs}


def to_engine(
    inputs: dict[str, np.ndarray],
    prepared: dict[str, np.ndarray],
    *,
    streaming: bool,
    engine: EngineNames = NEWEST,
) -> dict[str, np.ndarray]:
    """The client's tensors and preprocessing's outputs -> tensorrt_llm's inputs. Empty tensors are left out.

    Raises RefusedError for what the engine's release cannot do.
    """
    tensors = {name: prepared[source] for name, source in _FROM_PREPROCESSING.items()}
    tensors.update({name: inputs[source] for name, source in _FROM_CLIENT.items() if source in inputs})
    tensors["streaming"] = np.array([[streaming]])
    tensors["exclude_input_in_output"] = np.array([[True]])
    return engine.inputs({name: array for name, array in tensors.items() if array.size})


def stop_request() -> dict[str, np.ndarray]:
    """The tensors of a request that stops the one with the same id."""
    one = np.ones((1, 1), dtype=np.int32)
    return {"input_ids": one, "input_lengths": one, "request_output_len": one, "stop": np.array([[True]])}


def wanted_outputs(inputs: dict[str, np.ndarray], engine: EngineNames = NEWEST) -> list[str]:
    """The outputs of tensorrt_llm to ask for, without those that the engine's release does not have."""
    names = ["output_ids", "sequence_length", "batch_index", "sequence_index"]
    for flag, outputs in _OUTPUTS_OF.items():
        if scalar(inputs, flag, False):
            names.extend(outputs)
    return [name for name in names if name not in engine.lacks]
