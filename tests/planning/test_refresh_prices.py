"""Promises about scripts/refresh_prices.py, on a small catalog in SkyPilot's form with rows of our own."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from toolchain.errors import RecipeError
from toolchain.planning.price_list import PriceList, read_prices

SCRIPTS = Path(__file__).parents[2] / "scripts"


def card(name: str, count: int, mib: int, total: int) -> str:
    """``GpuInfo`` as the catalog writes it."""
    one = f"{{'Name': '{name}', 'Manufacturer': 'NVIDIA', 'Count': {count}, 'MemoryInfo': {{'SizeInMiB': {mib}}}}}"
    return f"\"{{'Gpus': [{one}], 'TotalGpuMemoryInMiB': {total}}}\""


AWS = f"""InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,GpuInfo,Price,SpotPrice,Region,Arch
g9.xlarge,A10G,1.0,4,16,{card("A10G", 1, 22888, 22888)},1.10,0.50,us-west-2,x86_64
g9.xlarge,A10G,1.0,4,16,{card("A10G", 1, 22888, 22888)},1.00,0.60,us-east-1,x86_64
p9.48xlarge,H100,8.0,192,2048,{card("H100", 8, 81559, 652472)},44.0,,us-east-1,x86_64
m9g.4xlarge,,,16,64,,0.20,,us-east-1,arm64
m9.4xlarge,,,16,64,,0.80,0.30,us-east-1,x86_64
m9.xlarge,,,4,16,,0.20,0.08,us-east-1,x86_64
"""
VAST = f"""InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,GpuInfo,Price,SpotPrice,Region
1x-A100_SXM4,A100,1,32,64,{card("A100", 1, 81920, 81920)},0.90,0.00,"Czechia, CZ, EU"
1x-A100_PCIE,A100,1,32,64,{card("A100", 1, 81920, 81920)},0.60,0.00,"Norway, NO, EU"
1x-A100_SXM4,A100,1,32,64,{card("A100", 1, 40960, 40960)},0.70,0.00,", US, NA"
2x-A100_SXM4,A100,2,32,64,{card("A100", 2, 81920, 81920)},0.20,0.00,", US, NA"
1x-H100_NVL,H100,1,32,64,{card("H100", 1, 95830, 95830)},0.30,0.00,"Bulgaria, BG, EU"
2x-RTX_4090,RTX4090,2,32,64,{card("RTX4090", 2, 49128, 49128)},0.70,0.00,"Oregon, US, NA"
1x-RTX_4060,RTX4060,1,32,64,{card("RTX4060", 1, 8188, 8188)},0.05,0.00,"Oregon, US, NA"
"""
RUNPOD = f"""InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,Region,SpotPrice,Price,GpuInfo
1x_H100_SECURE,H100,1.0,8,117,IN,1.0,1.5,{card("H100 PCIe", 1, 80, 80)}
1x_H100-SXM_SECURE,H100-SXM,1.0,8,117,IN,1.9,2.9,{card("H100 SXM", 1, 80, 80)}
1x_A100-80GB-SXM_SECURE,A100-80GB-SXM,1.0,8,117,IN,,1.4,{card("A100 SXM", 1, 80, 80)}
"""
GCP = "InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,Price,SpotPrice,Region\n,L4,1,,,0.1,0.1,us-east1\n"


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    sys.path.insert(0, str(SCRIPTS))
    yield importlib.import_module("refresh_prices")
    sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A git repository with the files, the last of two commits without a change of prices."""
    root = tmp_path_factory.mktemp("catalog")
    write(root, "README.md", "# Catalogs\n\n**Latest catalog schema version**: v8\n")
    for vendor, text in (("aws", AWS), ("vast", VAST), ("runpod", RUNPOD), ("gcp", GCP)):
        write(root, f"catalogs/v8/{vendor}/vms.csv", text)
    write(root, "catalogs/v9/aws/vms.csv", AWS.replace("1.00,0.60", "0.01,0.01"))
    git(root, "init", "-q")
    commit(root, "2026-11-01")
    write(root, "NEWS", "of another day")
    commit(root, "2026-11-20")
    return root


def write(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text, encoding="utf-8")


def git(root: Path, *arguments: str, **environment: str) -> None:
    who = {f"GIT_{one}_{what}": "a@b.c" for one in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    alone = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, **who, **environment}
    subprocess.run(["git", "-C", str(root), *arguments], check=True, env=alone)


def commit(root: Path, day: str) -> None:
    when = f"{day}T12:00:00+0000"
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", day, GIT_AUTHOR_DATE=when, GIT_COMMITTER_DATE=when)


def test_each_device_vendor_and_kind_has_its_cheapest_price_of_one_gpu(script: Any, catalog: Path) -> None:
    found = {(one.device, one.vendor, one.kind): (one.usd_per_hour, one.offer) for one in script.rows(catalog)}
    assert found == {
        ("a10g", "AWS", "on-demand"): (1.0, "g9.xlarge"),
        ("a10g", "AWS", "spot"): (0.5, "g9.xlarge"),
        ("h100", "AWS", "on-demand"): (5.5, "p9.48xlarge / 8"),
        ("cpu", "AWS", "on-demand"): (0.8, "m9.4xlarge"),
        ("cpu", "AWS", "spot"): (0.3, "m9.4xlarge"),
        ("a100-80gb", "Vast.ai", "on-demand"): (0.9, "1x-A100_SXM4"),
        ("a100-40gb", "Vast.ai", "on-demand"): (0.7, "1x-A100_SXM4"),
        ("rtx4090", "Vast.ai", "on-demand"): (0.35, "2x-RTX_4090 / 2"),
        ("h100", "RunPod", "on-demand"): (2.9, "1x_H100-SXM_SECURE"),
        ("h100", "RunPod", "spot"): (1.9, "1x_H100-SXM_SECURE"),
        ("a100-80gb", "RunPod", "on-demand"): (1.4, "1x_A100-80GB-SXM_SECURE"),
    }


def test_a_row_has_its_region_and_the_date_and_commit_of_its_files_last_change(script: Any, catalog: Path) -> None:
    (row,) = (one for one in script.rows(catalog) if (one.device, one.kind) == ("a10g", "spot"))
    assert (row.region, row.date) == ("us-west-2", "2026-11-01")
    first = subprocess.run(
        ["git", "-C", str(catalog), "rev-list", "--max-parents=0", "HEAD"], capture_output=True, text=True, check=True
    ).stdout
    assert row.source == f"{script.ADDRESS} catalogs/v8/aws/vms.csv @{first[:8]}"


def test_rows_by_hand_stay_and_those_below_the_mark_are_replaced(script: Any, catalog: Path) -> None:
    by_hand = "- {device: l4, usd_per_hour: 0.7, vendor: GCP, kind: on-demand, date: 2024-02-01}\n\n"
    old = "- {device: l4, usd_per_hour: 0.01, vendor: AWS, kind: spot, date: 2025-01-01}\n"
    made = script.refreshed(by_hand + script.MARK + "\n\n" + old, script.rows(catalog))
    assert made.startswith(by_hand + script.MARK)
    assert "0.01" not in made
    assert script.refreshed(made, script.rows(catalog)) == made
    known = PriceList(rows=read_prices(made, Path("prices.yaml")))
    assert [one.usd_per_hour for one in map(known.of, ("l4", "h100", "rtx4090")) if one] == [0.7, 2.9, 0.35]


def test_the_shipped_file_has_the_mark(script: Any) -> None:
    assert script.PRICES.read_text(encoding="utf-8").count(script.MARK) == 1
    with pytest.raises(RecipeError, match="the mark is missing"):
        script.refreshed("- {}", [])


def test_what_is_no_catalog_and_a_clone_without_history_are_refused(script: Any, catalog: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="not a checkout"):
        script.rows(tmp_path)
    shallow = tmp_path / "shallow"
    git(tmp_path, "clone", "-q", "--depth", "1", f"file://{catalog}", str(shallow))
    with pytest.raises(RecipeError, match="shallow"):
        script.rows(shallow)
