"""Which tensor becomes which, when the engine's release is older than the names that clients use."""

from __future__ import annotations

import numpy as np
import pytest
from tensors import RefusedError
from wiring import NEWEST, PREPROCESSED, EngineNames, to_engine, wanted_outputs

OLD = {
    "engine_release": "TensorRT-LLM 0.12.0",
    "engine_renamed": "min_tokens=min_length seed=random_seed",
    "engine_lacks": "num_return_sequences exclude_input_in_output return_num_input_tokens sequence_index"
    " num_input_tokens",
}
PREPARED = {name: np.ones((1, 1), dtype=np.int32) for name in PREPROCESSED}


def engine(inputs: dict[str, np.ndarray], names: EngineNames) -> dict[str, np.ndarray]:
    return to_engine(inputs, PREPARED, streaming=True, engine=names)


def test_names_of_an_older_release_are_used_and_values_kept() -> None:
    inputs = {"min_tokens": np.array([[3]]), "seed": np.array([[7]], dtype=np.uint64), "top_k": np.array([[5]])}
    tensors = engine(inputs, EngineNames.of(OLD))
    assert {"min_tokens", "seed"} & set(tensors) == set()
    assert (tensors["min_length"].item(), tensors["random_seed"].item(), tensors["runtime_top_k"].item()) == (3, 7, 5)
    assert tensors["random_seed"].dtype == np.uint64


def test_newest_names_are_left_alone() -> None:
    tensors = engine({"seed": np.array([[7]])}, NEWEST)
    assert tensors["seed"].item() == 7
    assert bool(tensors["exclude_input_in_output"].item()), "this model puts the prompt in front itself"
    empty = EngineNames.of({"engine_release": "", "engine_renamed": "", "engine_lacks": ""})
    assert empty == NEWEST


def test_what_the_release_lacks_is_refused_by_name_and_release() -> None:
    with pytest.raises(
        RefusedError, match=r"num_return_sequences: the engine's release, TensorRT-LLM 0\.12\.0, does not"
    ):
        engine({"num_return_sequences": np.array([[2]])}, EngineNames.of(OLD))


@pytest.mark.parametrize(
    ("name", "value"), [("num_return_sequences", 1), ("num_return_sequences", 0), ("return_num_input_tokens", False)]
)
def test_what_asks_for_nothing_is_dropped(name: str, value: int) -> None:
    assert name not in engine({name: np.array([[value]])}, EngineNames.of(OLD))


def test_the_engine_is_not_told_to_leave_out_the_prompt_where_its_configuration_says_so() -> None:
    assert "exclude_input_in_output" not in engine({}, EngineNames.of(OLD))


def test_only_outputs_that_the_release_has_are_asked_for() -> None:
    asked = {"return_num_input_tokens": np.array([[True]]), "return_log_probs": np.array([[True]])}
    assert wanted_outputs(asked, EngineNames.of(OLD)) == [
        "output_ids",
        "sequence_length",
        "batch_index",
        "cum_log_probs",
        "output_log_probs",
    ]
    assert {"sequence_index", "num_input_tokens"} <= set(wanted_outputs(asked))
