"""Promises of the stage and of the verb, against servers whose delays are known: runs, warm-up, services, red flags."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tests.e2e.parrot import write_tokenizer
from tests.engine_folder import write_engine
from tests.measuring.slow_server import SlowServer, slow_server
from toolchain.cli import verbs
from toolchain.engine import Engine
from toolchain.errors import EndpointError, RejectedError
from toolchain.family import read_config
from toolchain.measuring.report import Report, read
from toolchain.measuring.tables import tables
from toolchain.pipeline.predicting import prediction_of
from toolchain.planning.plan import make_plan
from toolchain.progress import Silent
from toolchain.recipe import parse_recipe
from toolchain.stages.bench import Asked, Door, Load, Provenance, Tokens, bench

ONE = Load(kind="closed", concurrency=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(made)
    return made


def measured(folder: Path, servers: list[SlowServer], **asked: Any) -> Report:
    doors = [Door("openai-completions", server.url, "slow") for server in servers]
    settled = {"loads": (ONE,), "lengths": (64,), "output_tokens": 4, "requests": 3, "warmup": 1} | asked
    return bench(doors, Asked(**settled), Tokens.load(folder), Provenance("slow"), Silent())


def test_each_length_and_load_is_a_run_and_warm_up_is_not_in_it(folder: Path) -> None:
    with slow_server() as server:
        loads = (ONE, Load(kind="open", rate_per_s=200))
        report = measured(folder, [server], lengths=(64, 96), loads=loads)
    assert [(one.conditions.input_tokens, one.conditions.load) for one in report.runs] == [
        (length, load) for length in (64, 96) for load in loads
    ]
    assert [len(one.requests) for one in report.runs] == [3] * 4
    assert len(server.bodies) == 4 * (3 + 1)
    warm, *asked = [body["prompt"] for body in server.bodies[:4]]
    assert warm not in asked
    prompts = [body["prompt"] for body in server.bodies]
    assert len(set(prompts)) == len(prompts)  # a cache of prompts must not help any run
    assert report.services[0].server == {"version": "1.2.3"}


@pytest.mark.parametrize("drafts", [None, (0, 0), (6, 3)])
def test_drafts_are_told_of_an_engine_that_drafts_and_no_other_is_asked_for_them(
    folder: Path, drafts: tuple[int, int] | None
) -> None:
    with slow_server(drafts=drafts) as server:
        asked = Asked(loads=(ONE,), lengths=(64,), output_tokens=4, requests=3, warmup=1)
        door = Door("triton-http", server.url, "slow")
        report = bench([door], asked, Tokens.load(folder), Provenance("slow"), Silent())
    (run,) = report.runs
    told = drafts == (6, 3)
    assert [one.drafts for one in run.requests] == [drafts if told else None] * 3
    assert run.summary()["draft_acceptance"] == (0.5 if told else None)
    assert [bool(body.get("return_perf_metrics")) for body in server.bodies] == [True, *[told] * 4]
    columns, rows = tables([report])[0].columns, tables([report])[0].table_rows
    assert ("drafts accepted" in columns, rows[0][-1] == "50 %") == (told, told)


def test_the_same_measurement_twice_has_the_same_conditions(folder: Path) -> None:
    with slow_server() as server:
        first, second = (measured(folder, [server]) for _ in range(2))
    assert first.runs[0].conditions == second.runs[0].conditions


@pytest.mark.parametrize("pattern", ["one-at-a-time", "staggered", "simultaneous"])
def test_every_service_gets_every_request(folder: Path, pattern: str) -> None:
    with slow_server() as a, slow_server() as b, slow_server() as c:
        run = measured(folder, [a, b, c], pattern=pattern).runs[0]
        assert [len(server.bodies) for server in (a, b, c)] == [4] * 3
    assert [len(run.of(service)) for service in range(3)] == [3] * 3
    assert run.conditions.services == 3
    starts = [run.of(service)[0].scheduled_s for service in range(3)]
    assert starts == sorted(starts)
    assert (len(set(starts)) == 1) == (pattern == "simultaneous")


def test_an_answer_that_is_not_as_long_as_asked_is_flagged(folder: Path) -> None:
    """The words of this server are several tokens each."""
    with slow_server() as server:
        flags = measured(folder, [server], output_tokens=8).runs[0].flags()
    assert any(flag.startswith("output_tokens: 8 claimed") for flag in flags)


def test_a_file_is_read_on_from_run_to_run(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"prompt {number}"}) + "\n" for number in range(6)))
    loads = (ONE, Load(kind="closed", concurrency=1, seed=1))
    with slow_server() as server:
        report = measured(folder, [server], file=file, loads=loads)
    numbers = [int(body["prompt"].split()[1]) for body in server.bodies]
    assert numbers == [0, 1, 2, 3, 4, 5, 0, 1]
    assert not any("different prompts" in flag for run in report.runs for flag in run.flags())


def test_a_service_that_answers_no_warm_up_ends_the_measurement(folder: Path) -> None:
    with slow_server() as good, slow_server(fail_every=1) as bad:  # noqa: SIM117
        with pytest.raises(EndpointError, match=r"not one warm-up request was answered: RejectedError: 503: too many"):
            measured(folder, [good, bad])


def test_a_prompt_that_leaves_no_answer_is_refused(folder: Path) -> None:
    with pytest.raises(RejectedError, match="leaves nothing of 4096"):
        measured(folder, [], lengths=(4096,), output_tokens=None)


def verb(folder: Path, out: Path, server: SlowServer, *words: str) -> Result:
    argv = ["--url", server.url, "--door", "openai-completions", "--tokenizer", str(folder), "--out", str(out)]
    load = ["--lengths", "64", "--output-tokens", "4", "--requests", "3", "--warmup", "0"]
    return CliRunner().invoke(verbs, ["bench", *argv, *load, *words])


def test_the_verb_writes_the_report_and_shows_every_percentile(folder: Path, tmp_path: Path) -> None:
    with slow_server() as server:
        result = verb(folder, tmp_path / "a.json", server, "--concurrency", "1,2", "--api-key", "hidden-key")
    assert result.exit_code == 0, result.output
    assert all(word in result.output for word in ("time to first token", "min", "p50", "p90", "p99", "max"))
    assert [run.conditions.load.concurrency for run in read(tmp_path / "a.json").runs] == [1, 2]
    assert "hidden-key" not in (tmp_path / "a.json").read_text()


def test_the_verb_draws_what_it_measured_and_the_memory_of_a_server_on_this_machine(
    folder: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    with slow_server(next_s=0.01) as server:
        result = verb(folder, tmp_path / "a.json", server, "--concurrency", "2", "--report", str(page))
    assert result.exit_code == 0, result.output
    report = read(tmp_path / "a.json")
    assert report.watched is not None
    assert all(run.memory and run.memory[0].rss_bytes for run in report.runs)
    assert "<h2>Memory of the servers</h2>" in page.read_text()


def told_by(engine: Engine, recipe: str) -> Engine:
    """The engine as that recipe would have made it."""
    return replace(engine, stamp=replace(engine.stamp, recipe=recipe))


def test_the_plan_of_an_engine_is_in_the_words_of_a_report(random_llama: Callable[..., Path], tmp_path: Path) -> None:
    """From the recipe in its stamp. A CPU has no plan of times; without a checkpoint beside it, no shape is known."""
    text = "name: one\nmodel: m\ndevice: {}\nquantization: {{weights: int4}}\nlimits: {{max_seq_len: 128}}\n"
    engine = told_by(write_engine(tmp_path / "one" / "engine", "1.2.1", device="l4"), text.format("l4"))
    assert prediction_of(engine, tmp_path / "one.yaml") is None
    shape = json.loads((random_llama() / "config.json").read_text())
    (tmp_path / "one" / "checkpoint").mkdir()
    (tmp_path / "one" / "checkpoint" / "config.json").write_text(json.dumps(shape))
    told = prediction_of(engine, tmp_path / "one.yaml")
    plan = make_plan(parse_recipe(text.format("l4"), tmp_path / "one.yaml"), read_config(shape, "one"))
    assert told is not None
    assert plan.latency is not None
    assert [(one.tokens, one.seconds, one.floor_s) for one in told.ttft] == [
        (one.tokens, one.seconds, one.floor_s) for one in plan.latency.ttft
    ]
    assert all(one.floor_s < one.seconds for one in (*told.ttft, *told.itl))
    cpu = told_by(write_engine(tmp_path / "one" / "cpu", "1.2.1", device="cpu"), text.format("cpu"))
    assert prediction_of(cpu, tmp_path / "one.yaml") is None


def test_a_recipes_services_are_asked_where_serve_puts_them(tmp_path: Path) -> None:
    from toolchain.cli.measuring import _urls

    recipe = tmp_path / "three.yaml"
    recipe.write_text("model: m\ndevice: a100\nservices: 3\nserve: {host: 0.0.0.0, http_port: 9000, grpc_port: 9001}\n")
    assert _urls("triton-grpc", str(recipe)) == ["127.0.0.1:9001", "127.0.0.1:9011", "127.0.0.1:9021"]
    assert _urls("triton-http", str(recipe))[2] == "http://127.0.0.1:9020"
    assert _urls("openai-chat", str(recipe)) == []


def test_when_everything_fails_the_report_is_kept_and_the_verb_fails(folder: Path, tmp_path: Path) -> None:
    with slow_server(fail_every=1) as server:
        result = verb(folder, tmp_path / "a.json", server)
    assert result.exit_code == 6
    assert "failed 3 times: RejectedError: 503: too many" in result.output
    assert read(tmp_path / "a.json").runs[0].summary()["failed"] == 3


def test_two_reports_of_the_same_measurement_are_compared(folder: Path, tmp_path: Path) -> None:
    with slow_server(first_s=0.01) as fast, slow_server(first_s=0.3) as slow:
        for name, server in (("a.json", fast), ("b.json", slow)):
            assert verb(folder, tmp_path / name, server).exit_code == 0
    paths = [str(tmp_path / name) for name in ("a.json", "b.json")]
    result = CliRunner().invoke(verbs, ["bench", "compare", *paths, "--json"])
    lines = {one["quantity"]: one for one in json.loads(result.stdout)["runs"][0]["lines"]}
    assert lines["ttft_s p50"]["ratio"]["low"] > 1
    assert "B / A" in CliRunner().invoke(verbs, ["bench", "compare", *paths]).output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--concurrency", "1.5"), "whole numbers"),
        (("--rate", "fast"), "'fast' is not a number above 0"),
        (("--extra", "[1]"), "a JSON object"),
    ],
)
def test_typing_errors_are_named(folder: Path, tmp_path: Path, words: tuple[str, str], message: str) -> None:
    with slow_server() as server:
        result = verb(folder, tmp_path / "a.json", server, *words)
    assert result.exit_code == 2
    assert message in result.output
