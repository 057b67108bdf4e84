"""Promises about which price counts, and about files of prices."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest

from toolchain.device import prices
from toolchain.errors import RecipeError
from toolchain.planning.price_list import PriceList, age_days, named, read_prices

FILE = """\
- {device: RTX 4090, usd_per_hour: 0.44, vendor: Attic, kind: on-demand, date: 2026-11-01}
- device: rtx4090
  usd_per_hour: 0.2
  vendor: Attic
  kind: spot
  date: 2026-11-01
- {device: h100, usd_per_hour: 2.5, vendor: Attic, kind: spot, date: 2026-11-01, source: an invoice}
"""


def test_the_cheapest_on_demand_counts_and_spot_only_where_there_is_nothing_else() -> None:
    public = PriceList().of("rtx4090")
    assert public is not None
    recent = [row for row in prices("rtx4090") if row.kind == "on-demand" and row.date >= "2026"]
    assert public.usd_per_hour == min(row.usd_per_hour for row in recent)
    mine = PriceList(rows=read_prices(FILE, Path("mine.yaml")))
    assert [row.usd_per_hour for row in (mine.of("rtx4090"), mine.of("h100")) if row] == [0.44, 2.5]
    assert mine.of("l4") is None  # the file replaces the public prices


def test_a_price_of_years_ago_does_not_count_beside_one_of_today() -> None:
    gone = "vendor: Gone\n  kind: on-demand\n  date: 2024-08-01"
    rows = read_prices(FILE.replace("vendor: Attic\n  kind: spot\n  date: 2026-11-01", gone), Path("mine.yaml"))
    newest = PriceList(rows=rows).of("rtx4090")
    assert newest is not None
    assert (newest.usd_per_hour, newest.vendor) == (0.44, "Attic")
    alone = PriceList(rows=tuple(row for row in rows if row.vendor == "Gone")).of("rtx4090")
    assert alone is not None
    assert alone.usd_per_hour == 0.2


def test_the_price_of_a_device_comes_before_the_price_of_all_and_both_before_public_ones() -> None:
    own, every = named(["0.5", "RTX 4090=0.44"])
    chosen = PriceList(own=own, every=every)
    assert [row.usd_per_hour for row in (chosen.of("rtx4090"), chosen.of("cpu")) if row] == [0.44, 0.5]
    own, every = named(["l4=0.6"])
    assert every is None
    left = PriceList(own=own, every=every).of("t4")
    assert left is not None
    assert left == PriceList().of("t4")


@pytest.mark.parametrize("text", ["0", "-1", "free", "l4=", "l4=nan", "l4=inf", ""])
def test_what_is_no_price_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="--price"):
        named([text])


def test_a_price_of_an_unknown_device_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="did you mean 'rtx4090'"):
        named(["rtx4099=0.4"])


def test_a_price_has_an_age_and_the_users_own_has_none() -> None:
    (first, *_) = read_prices(FILE, Path("mine.yaml"))
    own, _ = named(["l4=0.6"])
    assert age_days(first, datetime.date(2026, 11, 22)) == 21
    assert age_days(own["l4"], datetime.date(2026, 11, 22)) is None
    chosen = PriceList(old_days=20)
    assert chosen.old(first, datetime.date(2026, 11, 22))
    assert not chosen.old(first, datetime.date(2026, 11, 20))
    assert not chosen.old(own["l4"], datetime.date(2030, 1, 1))


def test_every_mistake_of_a_file_is_told_with_its_line() -> None:
    text = FILE + "- {device: rtx4091, usd_per_hour: 1.0, vendor: A, kind: spot, date: 2026-11-01}\n"
    text += "- {device: l4, usd_per_hour: 0.0, vendor: A, kind: weekly, date: soon, colour: red}\n"
    with pytest.raises(RecipeError) as caught:
        read_prices(text, Path("mine.yaml"))
    told = [str(problem) for problem in caught.value.problems]
    assert "mine.yaml:8: device: 'rtx4091' is not a known device (did you mean 'rtx4090'?)" in told
    assert {problem.path for problem in caught.value.problems if problem.line == 9} == {
        *("usd_per_hour", "kind", "date", "colour")
    }
    assert "- {device:" in caught.value.hint


@pytest.mark.parametrize("text", ["", "device: l4", "[", "- 5", "[]", "- {device: [1]}"])
def test_a_file_that_is_no_list_of_prices_is_refused_by_name(text: str) -> None:
    with pytest.raises(RecipeError, match="mine"):
        read_prices(text, Path("mine.yaml"))


def test_the_public_list_is_a_file_of_prices_itself(root: Path) -> None:
    file = root / "toolchain" / "facts" / "prices.yaml"
    rows = read_prices(file.read_text(encoding="utf-8"), file)
    assert sorted(map(str, rows)) == sorted(str(row) for name in {row.device for row in rows} for row in prices(name))
    assert all(row.vendor and row.date and row.source and row.kind for row in rows)
