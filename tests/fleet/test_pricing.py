"""Promises about what a node costs."""

from __future__ import annotations

from typing import Any

import pytest

from toolchain.device import prices as public_prices
from toolchain.fleet.control.pricing import priced


def price(prices: dict[str, float], **said: Any) -> Any:
    node = {"provider": "anna", "device": "rtx4090", "gpus": 3, "price_per_hour": None, **said}
    return priced({"nodes/n1": node}, prices)["nodes/n1"]["price_per_hour"]


@pytest.mark.parametrize(
    ("prices", "said", "expected"),
    [
        ({"rtx4090": 0.1}, {}, 0.3),  # not 0.30000000000000004
        ({"rtx4090": 0.1, "anna/rtx4090": 0.2}, {}, 0.6),
        ({"rtx4090": 0.1, "bert/rtx4090": 0.2}, {}, 0.3),
        ({"rtx4090": 0.1}, {"price_per_hour": 5.0}, 5.0),
        ({"rtx4090": 0.1}, {"price_per_hour": 0}, 0),
        ({"cpu": 0.07}, {"device": "cpu", "gpus": 0}, 0.07),
        ({}, {"device": "cpu", "gpus": 0}, None),
        ({}, {"device": "of another world"}, None),
        ({"rtx4090": 0.1}, {"gpus": "x"}, None),
    ],
)
def test_a_nodes_own_price_counts_then_the_deployments(
    prices: dict[str, float], said: dict[str, Any], expected: float | None
) -> None:
    assert price(prices, **said) == expected


def test_where_nobody_names_a_price_a_public_one_counts() -> None:
    on_demand = {row.usd_per_hour for row in public_prices("rtx4090") if row.kind == "on-demand"}
    assert price({}, gpus=1) in on_demand
