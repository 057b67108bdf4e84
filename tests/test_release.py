"""Promises about TensorRT-LLM releases."""

from __future__ import annotations

import pytest

from toolchain.device import devices
from toolchain.errors import PlanError
from toolchain.release import newest_release, pinned_release, releases, usable


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


@pytest.mark.parametrize("sm", [80, 86, 89, 90])
def test_newer_cards_get_the_last_release_with_an_engine_builder(sm: int) -> None:
    release, reason = newest_release(sm, "tensorrt_engine")
    assert release.version == "1.2.1"
    assert release.container == "tritonserver:26.07-trtllm-python-py3"
    assert "trtllm-build" in reason


def test_llmapi_begins_with_1_0() -> None:
    assert usable(120, "tensorrt_llmapi")[0].version == "1.0.0"
    assert newest_release(120, "tensorrt_llmapi")[0].version == "1.2.1"


def test_sm_that_no_release_lists_is_refused() -> None:
    with pytest.raises(PlanError, match="SM 61"):
        newest_release(61, "tensorrt_engine")


@pytest.mark.parametrize(
    ("version", "sm", "backend", "said"),
    [
        ("9.9.9", 89, "tensorrt_engine", "not in the table"),
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
