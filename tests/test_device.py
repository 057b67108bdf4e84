"""Promises about the facts on devices and prices."""

from __future__ import annotations

import datetime

import pytest

from toolchain.device import device, devices, prices
from toolchain.errors import RecipeError
from toolchain.quantization import KV, WEIGHTS
from toolchain.release import backends


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("4090", "rtx4090"),
        ("Tesla T4", "t4"),
        ("A100", "a100-80gb"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("CPU", "cpu"),
    ],
)
def test_device_is_found_by_every_spelling_that_people_and_drivers_use(spelling: str, name: str) -> None:
    assert device(spelling).name == name


def test_no_two_devices_share_a_spelling() -> None:
    for name, entry in devices().items():
        for spelling in (name, entry.title, *entry.aliases):
            assert device(spelling).name == name


def test_unknown_device_gets_the_nearest_name_and_the_list() -> None:
    with pytest.raises(RecipeError, match="did you mean 'rtx4090'") as caught:
        device("rtx4091")
    assert "a100-80gb" in caught.value.hint
    with pytest.raises(RecipeError, match=r"'abacus' is not known$"):
        device("abacus")


def test_memory_is_what_the_driver_reports_and_not_the_data_sheet() -> None:
    # https://github.com/modal-labs/modal-client/pull/2797 lists nvidia-smi totals of seven cards
    reported = {"h100": 81559, "a100-80gb": 81920, "a100-40gb": 40960, "l40s": 46068, "l4": 23034, "t4": 15360}
    assert {name: device(name).memory_mib for name in reported} == reported
    assert device("rtx4090").memory_mib == 24564
    assert device("cpu").memory_bytes is None


def test_fp8_begins_with_sm_89_and_bfloat16_with_sm_80() -> None:
    for entry in devices().values():
        if entry.sm is not None:
            assert ("fp8" in entry.dtypes) == (entry.sm >= 89)
            assert ("bf16" in entry.dtypes) == (entry.sm >= 80)


def test_every_tensor_core_peak_is_of_a_format_that_the_device_has() -> None:
    for entry in devices().values():
        assert set(entry.tflops) <= entry.dtypes


def test_every_fact_has_a_source_and_a_date() -> None:
    for entry in devices().values():
        assert entry.date >= "2020"
        named = {field.strip() for fields in entry.sources for field in fields.split(",")}
        assert all(entry.sources.values())
        if not entry.is_cpu:
            assert {"memory_mib", "tflops", "bandwidth_gb_s"} <= named, entry.name
        known = {"bandwidth_gb_s", "power_w", "tflops", *(f"tflops.{dtype}" for dtype in entry.tflops)}
        assert entry.estimated <= known, entry.name


def test_every_price_names_a_known_device_its_vendor_date_and_source() -> None:
    found = [price for name in devices() for price in prices(name)]
    assert len(found) >= 20
    for price in found:
        assert 0.01 < price.usd_per_hour < 50
        assert price.kind in ("on-demand", "spot")
        assert price.vendor
        assert price.offer
        assert price.source
        assert datetime.date(2023, 1, 1) <= datetime.date.fromisoformat(price.date) <= datetime.date.today()


def test_prices_come_cheapest_first_and_may_be_none() -> None:
    a100 = [price.usd_per_hour for price in prices("a100-80gb")]
    assert a100 == sorted(a100)
    assert {0.89, 1.69, 3.67, 5.12} <= set(a100)
    assert prices("no such device") == ()


def test_every_gpu_has_a_price_on_demand() -> None:
    for entry in devices().values():
        if not entry.is_cpu:
            assert any(price.kind == "on-demand" for price in prices(entry.name)), entry.name


def test_backends_of_devices_and_their_formats_are_known() -> None:
    for entry in devices().values():
        assert entry.backends
        assert set(entry.backends) <= set(backends())
    for backend in backends().values():
        assert set(backend.weights) <= set(WEIGHTS)
        assert set(backend.kv) <= set(KV)


def test_a_gpu_and_the_cpu_never_share_a_backend() -> None:
    for entry in devices().values():
        assert ("openvino" in entry.backends) == entry.is_cpu
