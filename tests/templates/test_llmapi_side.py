"""The pure parts of ``tensorrt_llm`` for TensorRT-LLM's PyTorch runtime: what a request becomes, what the runtime gets.

The folder's modules have the names of another backend's, so they are loaded by path.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from asked import Limits, Specification
from tensors import RefusedError
from words import flatten

FOLDER = Path(__file__).resolve().parents[2] / "model_repo_templates" / "tensorrt_llmapi" / "tensorrt_llm" / "1"
STAND_IN = Path(__file__).resolve().parents[1] / "backends" / "stand_in" / "tensorrt_llm" / "__init__.py"
LIMITS = Limits(
    max_seq_len=100, max_input_len=60, vocab_size=500, eos_ids=(2, 3), max_sequences=8, max_beam_width=4,
    exclude_input=True,
)  # fmt: skip


def _load(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"llmapi_{file.stem}_of_{file.parent.name}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


specification, llm_thread, stand_in = (
    _load(FOLDER / "specification.py"), _load(FOLDER / "llm_thread.py"), _load(STAND_IN),
)  # fmt: skip


def ask(**more: object) -> Specification:
    tensors = {"input_ids": [5, 6, 7], "input_lengths": 3, "request_output_len": 10, **more}
    found: Specification = specification.specify(
        {
            name: value if isinstance(value, np.ndarray) else np.atleast_2d(np.array(value))
            for name, value in tensors.items()
        },
        LIMITS,
    )
    return found


def sampling(**more: object) -> dict[str, Any]:
    return dict(ask(**more).options["sampling"])


EVERYTHING = {
    "runtime_top_k": 5,
    "runtime_top_p": 0.5,
    "temperature": 0.7,
    "repetition_penalty": 1.2,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.2,
    "min_tokens": 3,
    "return_log_probs": True,
    "pad_id": 4,
    "end_id": 2,
}


@pytest.mark.parametrize("asked", [{}, EVERYTHING, {"end_id": -1}, {"streaming": True}])
def test_every_option_is_a_field_of_sampling_params(asked: dict[str, object]) -> None:
    """The stand-in has the real class's fields and, as it does, takes no others."""
    params = stand_in.SamplingParams(**sampling(**asked), seed=1)
    assert params.detokenize is False


def test_what_is_asked_for_arrives_under_the_runtimes_names() -> None:
    found = sampling(**EVERYTHING)
    assert (found["top_k"], found["top_p"], found["temperature"]) == pytest.approx((5, 0.5, 0.7))
    assert (found["repetition_penalty"], found["presence_penalty"]) == pytest.approx((1.2, 0.1))
    assert found["frequency_penalty"] == pytest.approx(0.2)
    assert (found["min_tokens"], found["max_tokens"], found["pad_id"], found["logprobs"]) == (3, 10, 4, 1)


@pytest.mark.parametrize(
    "asked",
    [{}, {"temperature": 3.0}, {"runtime_top_k": 1, "runtime_top_p": 0.9}, {"runtime_top_p": 0.5, "temperature": 0.0}],
)
def test_greedy_decoding_is_said_as_top_k_1(asked: dict[str, float]) -> None:
    found = sampling(**asked)
    assert found["top_k"] == 1
    assert not {"top_p", "temperature"} & found.keys()


def test_a_nucleus_leaves_top_k_to_the_runtime() -> None:
    assert "top_k" not in sampling(runtime_top_p=0.5)


def test_own_end_id_stands_for_all_of_them_and_none_ignores_them() -> None:
    assert (sampling()["end_id"], sampling()["stop_token_ids"]) == (2, [3])
    assert ask(end_id=3).options["stop_ids"] == [2, 3]
    foreign = sampling(end_id=7)
    assert foreign["end_id"] == 7
    assert "stop_token_ids" not in foreign
    assert (sampling(end_id=-1)["end_id"], sampling(end_id=-1)["ignore_eos"]) == (-1, True)


def test_tokens_come_one_by_one_where_someone_looks_at_them() -> None:
    assert not ask().options["streaming"]
    assert ask(streaming=True).options["streaming"]
    assert ask(stop_words_list=flatten([[8, 9]])[np.newaxis]).options["streaming"]


def test_several_sequences_have_seeds_in_a_row() -> None:
    assert ask(num_return_sequences=3, seed=5, runtime_top_k=4).seeds == (5, 6, 7)


@pytest.mark.parametrize(
    "name", ["beam_width", "len_penalty", "bad_words_list", "guided_decoding_guide", "lora_task_id"]
)
def test_what_the_runtime_is_not_set_up_for_is_refused_by_name(name: str) -> None:
    value = flatten([[8, 9]])[np.newaxis] if name == "bad_words_list" else np.array([[2]])
    if name == "guided_decoding_guide":
        value = np.array([[b"json"]], dtype=object)
    with pytest.raises(RefusedError, match=name):
        ask(**{name: value})


def test_variables_of_the_mpi_job_that_started_triton_are_forgotten_and_its_settings_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gone = ("OMPI_COMM_WORLD_RANK", "OMPI_MCA_orte_ess_jobid", "PMIX_RANK", "PMI_SIZE")
    kept = ("OMPI_MCA_btl", "PMIX_MCA_gds", "CUDA_VISIBLE_DEVICES")
    for name in gone + kept:
        monkeypatch.setenv(name, "1")
    llm_thread.forget_other_mpi_jobs()
    assert not set(gone) & os.environ.keys()
    assert set(kept) <= os.environ.keys()


@pytest.mark.parametrize("entries", [[{7: 0.5, 9: 1.0}, {8: 0.25}], [0.5, 0.25]])
def test_log_probs_are_read_in_both_of_the_forms_that_releases_have(entries: list[Any]) -> None:
    wrapped = [
        {token: stand_in.Logprob(value) for token, value in entry.items()} if isinstance(entry, dict) else entry
        for entry in entries
    ]
    answer = stand_in.CompletionOutput(token_ids=[1, 7, 8], logprobs=[0.0, *wrapped])
    options = {"sampling": {"logprobs": 1}}
    assert llm_thread._log_probs(answer, 1, options) == [0.5, 0.25]
    assert llm_thread._log_probs(answer, 1, {"sampling": {}}) is None
