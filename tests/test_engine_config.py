"""The engine's own config.json against its passport: every difference is told, and nothing is served with one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.engine_folder import LIMITS, config_json, write_engine
from toolchain.engine_config import EngineConfig
from toolchain.errors import ArtifactError


def test_numbers_are_read_where_the_builder_leaves_them(tmp_path: Path) -> None:
    built = EngineConfig.read(write_engine(tmp_path / "engine", "1.2.1", tp=2, pp=2).path)
    assert (built.version, built.tp, built.pp, built.world_size) == ("1.2.1", 2, 2, 4)
    assert (built.max_batch_size, built.max_seq_len, built.max_num_tokens, built.max_beam_width) == (8, 256, 1024, 1)
    assert (built.logits_dtype, built.quant_algo, built.kv_algo) == ("float32", "W4A16_AWQ", None)
    assert built.paged_context_fmha


def test_an_engine_that_is_what_its_passport_says_passes(tmp_path: Path) -> None:
    engine = write_engine(tmp_path / "engine", "0.17.0", config=config_json("0.17.0.post1"))
    EngineConfig.read(engine.path).check(engine.passport)


def test_every_difference_is_told_at_once(tmp_path: Path) -> None:
    config = config_json("0.19.0", replace(LIMITS, max_batch_size=4, max_seq_len=128, max_input_len=100))
    config["pretrained_config"]["quantization"] = {"quant_algo": "FP8", "kv_cache_quant_algo": "INT8"}
    config["build_config"]["plugin_config"]["use_paged_context_fmha"] = False
    engine = write_engine(tmp_path / "engine", "0.17.0", config=config)
    with pytest.raises(ArtifactError, match="not what its passport says") as caught:
        EngineConfig.read(engine.path).check(engine.passport)
    for line in (
        "version is 0.19.0, the passport says 0.17.0",
        "max_batch_size is 4, the passport says 8",
        "max_seq_len is 128, the passport says 256",
        "max_input_len is 100, the passport says 200",
        "quant_algo is FP8, the passport says W4A16_AWQ",
        "kv_cache_quant_algo is INT8, the passport says none",
        "use_paged_context_fmha is off, the passport asks for KV reuse or chunked context",
    ):
        assert f"\n  - {line}" in caught.value.message
    assert "scalellm build" in caught.value.hint
    assert "config.json" in caught.value.message


def test_a_drafts_tokens_are_not_part_of_the_limit(tmp_path: Path) -> None:
    config = config_json("1.2.1", replace(LIMITS, max_seq_len=LIMITS.max_seq_len + 10))
    config["build_config"]["max_draft_len"] = 10
    runtime = {"enable_kv_cache_reuse": True, "draft": {"tokens": 10}}
    engine = write_engine(tmp_path / "engine", "1.2.1", config=config, runtime=runtime)
    EngineConfig.read(engine.path).check(engine.passport)


def test_an_engine_for_more_drafted_tokens_than_its_passport_says_is_told(tmp_path: Path) -> None:
    config = config_json("1.2.1")
    config["build_config"]["max_draft_len"] = 10
    engine = write_engine(tmp_path / "engine", "1.2.1", config=config)
    with pytest.raises(ArtifactError, match="max_draft_len is 10, the passport says 0"):
        EngineConfig.read(engine.path).check(engine.passport)


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.pop("build_config"),
        lambda config: config["build_config"].update(max_batch_size="many"),
        lambda config: config["pretrained_config"].update(mapping=None),
    ],
)
def test_a_damaged_configuration_is_named_and_no_traceback(tmp_path: Path, change: Any) -> None:
    config = config_json("1.2.1")
    change(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=r"config\.json: not the configuration of a TensorRT-LLM engine"):
        EngineConfig.read(tmp_path)
