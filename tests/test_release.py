"""Promises about TensorRT-LLM releases."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from toolchain import workspace
from toolchain.device import devices
from toolchain.errors import PlanError
from toolchain.quantization import KV, WEIGHTS
from toolchain.release import backends, newest_release, order, pinned_release, releases, usable, within, without_engine


def test_releases_come_oldest_first_and_each_has_its_own_images() -> None:
    versions = [tuple(int(part) for part in version.split(".")) for version in releases()]
    assert versions == sorted(versions)
    tags = [tag for release in releases().values() for tag in release.triton]
    assert tags == sorted(tags)
    assert len(tags) == len(set(tags))


def test_t4_gets_its_last_release() -> None:
    release, reason = newest_release(75, "tensorrt_engine")
    assert (release.version, release.triton) == ("0.13.0", ("24.09",))
    assert "2620" in reason


def test_no_release_runs_smoothquant_or_fp8_on_a_t4() -> None:
    for needs in ({"w8a8"}, {"fp8"}, {"bf16"}):
        assert usable(75, "tensorrt_engine", frozenset(needs)) == ()
        with pytest.raises(PlanError, match=f"SM 75 with {needs.copy().pop()}"):
            newest_release(75, "tensorrt_engine", frozenset(needs))


def test_the_formats_that_are_needed_narrow_the_releases() -> None:
    """docs/source/release-notes.md @001eaece: FP8 on SM 120 from 0.19 on; the page of 1.0 lists INT8 there."""
    versions = [release.version for release in usable(120, "tensorrt_engine", frozenset({"fp8"}))]
    assert versions[0] == "0.19.0"
    assert usable(120, "tensorrt_engine", frozenset({"int8"}))[0].version == "1.0.0"
    assert "with fp8" in newest_release(120, "tensorrt_engine", frozenset({"fp8"}))[1]


def test_a_newer_release_without_the_format_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """No row of the table is like that today, so one is taken out here."""
    table = dict(releases())
    last = table["1.2.1"]
    without = {key: formats - {"int4"} for key, formats in last.formats.items()}
    table["1.2.1"] = replace(last, formats=without)
    monkeypatch.setattr("toolchain.release.releases", lambda: table)
    release, reason = newest_release(89, "tensorrt_engine", frozenset({"int4"}))
    assert release.version == "1.2.0"
    assert "with int4" in reason
    assert newest_release(89, "tensorrt_engine", frozenset({"fp8"}))[0].version == "1.2.1"


def test_what_a_device_has_some_release_of_each_of_its_backends_runs() -> None:
    """Of what the backend takes: a device's dtypes and a release's are two sides of the same pages."""
    for device in devices().values():
        for name in device.backends if device.sm is not None else ():
            accepts = backends()[name]
            schemes = [WEIGHTS[one] for one in accepts.weights] + [KV[one] for one in accepts.kv]
            for scheme in schemes:
                if scheme.needs <= device.dtypes:
                    assert device.sm is not None
                    assert usable(device.sm, name, scheme.needs), f"{device.name} {name} {scheme.name}"


def test_every_listed_sm_has_its_formats_for_each_backend_of_the_release() -> None:
    for release in releases().values():
        for sm in release.sms:
            for name in ("tensorrt_engine", "tensorrt_llmapi"):
                if release.has(name):
                    assert "fp16" in release.formats[name, sm], f"{release.version} {name} SM {sm}"


def test_spans_name_releases_of_the_table_so_that_a_typing_error_cannot_hide() -> None:
    table, flags = workspace.facts("releases"), workspace.facts("build_flags")["flags"]
    spans = [*table["precisions"], *table["fp8_context_fmha"], *table["traps"], *table["rebuild"], *flags.values()]
    spans += [span for row in flags.values() for span in row.get("spans", ())]
    for span in spans:
        assert {span[end] for end in ("from", "to") if end in span} <= set(releases()), span


def test_every_trap_and_span_of_formats_has_its_source_and_date() -> None:
    table = workspace.facts("releases")
    for row in (
        *table["precisions"],
        *table["traps"],
        *table["fp8_context_fmha"],
        *table["rebuild"],
        table["engine_ends"],
    ):
        assert row["source"], row
        assert row["date"].year == 2026, row


def test_traps_are_told_where_they_lie_and_nowhere_else() -> None:
    def told(version: str, sm: int, backend: str = "tensorrt_engine") -> str:
        return "\n".join(trap.text for trap in releases()[version].traps_of(backend, sm))

    assert "Unsupported architecture" in told("0.13.0", 75)
    assert "Unsupported architecture" not in told("0.13.0", 89)
    assert "overwritten with 1.0" in told("0.13.0", 89)
    assert "overwritten with 1.0" not in told("0.14.0", 89)
    assert "int4 layout" in told("1.2.1", 120, "tensorrt_llmapi")
    assert "max_batch_size" not in told("1.2.1", 120, "tensorrt_llmapi")


def test_what_is_taken_over_from_a_neighbor_is_marked() -> None:
    assert "driver" in releases()["0.13.0"].unconfirmed
    assert "driver" not in releases()["0.12.0"].unconfirmed
    assert all(release.unconfirmed <= {"driver", "sms"} for release in releases().values())


@pytest.mark.parametrize(
    ("version", "answer"), [("1.3", True), ("1.3.0", True), ("2.0.0", True), ("1.2.1", False), ("1.3.0rc20", False)]
)
def test_releases_from_1_3_on_have_no_engine(version: str, answer: bool) -> None:
    assert without_engine(version) is answer


def test_spans_include_both_ends_and_sort_versions_as_numbers() -> None:
    assert order("0.9.0") < order("0.12.0") < order("1.0.3.2510") < order("1.1.0")
    assert within("0.13.0", {"from": "0.13.0", "to": "0.13.0"})
    assert not within("0.12.0", {"from": "0.13.0"})
    assert not within("0.14.0", {"to": "0.13.0"})


@pytest.mark.parametrize("sm", [80, 86, 89, 90])
def test_newer_cards_get_the_last_release_with_an_engine_builder(sm: int) -> None:
    release, reason = newest_release(sm, "tensorrt_engine")
    assert release.version == "1.2.1"
    assert release.container == "tritonserver:26.07-trtllm-python-py3"
    assert "trtllm-build" in reason
    assert "1.3 and later have no engine path" in reason


def test_llmapi_begins_with_1_0() -> None:
    assert usable(120, "tensorrt_llmapi")[0].version == "1.0.0"
    assert newest_release(120, "tensorrt_llmapi")[0].version == "1.2.1"


def test_sm_that_no_release_lists_is_refused() -> None:
    with pytest.raises(PlanError, match="SM 61"):
        newest_release(61, "tensorrt_engine")


@pytest.mark.parametrize(
    ("version", "sm", "backend", "said"),
    [
        ("0.13.5", 89, "tensorrt_engine", "not in the table"),
        ("0.14.0", 75, "tensorrt_engine", "does not support SM 75"),
        ("0.17.0", 89, "tensorrt_llmapi", "no usable tensorrt_llmapi"),
    ],
)
def test_pin_that_cannot_work_is_refused_with_those_that_can(version: str, sm: int, backend: str, said: str) -> None:
    with pytest.raises(PlanError, match=said) as caught:
        pinned_release(version, sm, backend)
    assert usable(sm, backend)[-1].version in caught.value.hint


def test_pin_that_works_is_kept() -> None:
    assert pinned_release("0.17.0", 89, "tensorrt_engine")[0].triton[0] == "25.01"


def test_every_gpu_has_a_release_for_each_of_its_backends() -> None:
    for device in devices().values():
        for backend in device.backends:
            if device.sm is not None:
                assert usable(device.sm, backend), f"{device.name} {backend}"


def test_int4_and_int8_on_a_t4_want_a_build_of_ones_own_and_nothing_else_does() -> None:
    t4 = {version: one for version, one in releases().items() if 75 in one.sms}
    assert set(t4) == {"0.12.0", "0.13.0"}
    for version, release in t4.items():
        for weights in ("int4", "int8"):
            found = release.rebuild_for("tensorrt_engine", 75, weights)
            assert found is not None
            assert found.architectures == "75-real"
            assert any(f"v{version}" in step.argv for step in found.steps)
            assert not any("{" in word for step in found.steps for word in (*step.argv, step.says, step.where))
        assert "{" not in release.rebuilds[0].told("int4")
        assert release.rebuild_for("tensorrt_engine", 75, "none") is None  # plain matrices are cuBLAS's
        assert release.rebuild_for("tensorrt_engine", 89, "int4") is None
    assert releases()["0.14.0"].rebuild_for("tensorrt_engine", 75, "int4") is None


def test_the_change_of_nvidias_dockerfile_reaches_its_build_of_the_wheel(tmp_path: Path) -> None:
    """The one line of tensorrtllm_backend dockerfile/Dockerfile.trt_llm_backend @v0.13.0 that builds a wheel."""
    rebuild = releases()["0.13.0"].rebuild_for("tensorrt_engine", 75, "int4")
    assert rebuild is not None
    line = 'RUN cd tensorrt_llm && python3 scripts/build_wheel.py --trt_root="${TRT_ROOT}" -i -c && cd ..\n'
    argv = next(step.argv for step in rebuild.steps if step.name == "architectures")
    file = tmp_path / argv[-1]
    file.parent.mkdir(parents=True)
    file.write_text(line)
    subprocess.run(argv, cwd=tmp_path, check=True)
    assert file.read_text() == line.replace("build_wheel.py", "build_wheel.py --cuda_architectures 75-real")


def test_each_loader_row_names_a_release_of_the_table_and_ends_there() -> None:
    """From the release on that a row names, nothing is unread any more."""
    rows = {(one.feature, one.first) for release in releases().values() for one in release.unread}
    assert {first for _, first in rows} <= set(releases())
    assert {feature for feature, _ in rows} == {"rope-llama3-numbers", "qwen2-tied", "w4a8-bfloat16"}
    for version, release in releases().items():
        assert {one.feature for one in release.unread} == {
            feature for feature, first in rows if order(version) < order(first)
        }


def test_what_a_loader_is_only_not_known_to_read_does_not_narrow_the_releases() -> None:
    assert newest_release(75, "tensorrt_engine", features=frozenset({"rope-llama3-numbers"}))[0].version == "0.13.0"
    unread = releases()["0.13.0"].unread_of("tensorrt_engine", 75, frozenset({"rope-llama3-numbers"}))
    assert [one.confirmed for one in unread] == [False]
    assert releases()["0.13.0"].unread_of("tensorrt_llmapi", 75, frozenset({"rope-llama3-numbers"})) == ()


def test_no_release_is_taken_that_a_source_says_does_not_read_the_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {version: one for version, one in releases().items() if order(version) < order("0.16.0")}
    monkeypatch.setattr("toolchain.release.releases", lambda: table)
    features = frozenset({"w4a8-bfloat16"})
    with pytest.raises(PlanError, match=r"0\.15\.0 does not read this model's checkpoint: W4A8"):
        newest_release(89, "tensorrt_engine", frozenset({"int4", "fp8"}), features)
    assert newest_release(90, "tensorrt_engine", frozenset({"int4", "fp8"}), features)[0].version == "0.15.0"
