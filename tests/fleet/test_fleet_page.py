"""The page's fleet view in a real browser: nodes, replicas, money and events, as the nodes tell them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.fleet.shown import Shown, replica, showing
from tests.gateway.behind_gateway import Gateway, settings_for
from tests.gateway.browser import WHY_NOT, chromium, page_of, running
from tests.gateway.test_browser import PHONE, assert_fits

pytestmark = [pytest.mark.timeout(120), pytest.mark.skipif(chromium() is None, reason=WHY_NOT)]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = chromium()
    assert program is not None
    with running(program) as found:
        yield found


@pytest.fixture
def shown(tmp_path: Path) -> Iterator[Shown]:
    found = Shown(tmp_path / "parrot")
    found.node("a100-west", replica("r1"), replica("r2", used=610), device="a100-80gb", gpus=2, price_per_hour=3.2)
    found.node("home", replica("r3", "starting", why="loads its engine"), provider="bert")
    found.node("spare", price_per_hour=None, device="cpu", gpus=0)
    found.happened("ready", "replica r1 (version 1) on a100-west takes requests", 200)
    found.happened("lost", "replica r9 was on attic, which is gone", 90)
    yield found
    found.close()


@pytest.fixture
def door(shown: Shown, parrot: Path) -> Iterator[Gateway]:
    with showing(shown, settings_for(parrot)) as found:
        yield found


def fleet_of(page: Page) -> None:
    page.get_by_role("button", name="Fleet", exact=True).click()
    expect(page.get_by_role("region", name="Fleet")).to_be_visible()


def test_nodes_replicas_cost_and_events_are_shown(browser: Browser, door: Gateway) -> None:
    with page_of(browser, f"{door.root}/") as page:
        expect(page.locator("#state")).to_have_text("2 of 3 ready")
        fleet_of(page)
        expect(page.get_by_label("Message", exact=True)).not_to_be_visible()
        expect(page.locator(".tile", has_text="Replicas ready").locator(".value")).to_have_text("2 of 3")
        expect(page.locator(".tile", has_text="Cost").locator(".value")).to_have_text("$3.64 /h")
        expect(page.locator(".tile", has_text="GPUs at work").locator(".value")).to_have_text("3")
        west = page.locator('[data-node="a100-west"]')
        expect(west).to_contain_text("2 \u00d7 A100 80GB")
        expect(west.get_by_role("meter", name="KV cache")).to_have_count(2)
        expect(page.locator('[data-node="home"]')).to_contain_text("loads its engine")
        expect(page.locator('[data-node="home"]')).to_contain_text("bert")
        expect(page.locator('[data-node="spare"] .free')).to_have_text("2 more replicas would fit")
        expect(page.locator(".events li").first).to_contain_text("which is gone")
        page.get_by_role("button", name="Chat", exact=True).click()
        expect(page.get_by_label("Message", exact=True)).to_be_visible()


def test_what_happens_is_seen_as_it_happens(browser: Browser, door: Gateway, shown: Shown) -> None:
    with page_of(browser, f"{door.root}/") as page:
        fleet_of(page)
        shown.gone("spare")
        shown.node("home", replica("r3"), provider="bert")
        shown.happened("ready", "replica r3 (version 1) on home takes requests")
        expect(page.locator("#state")).to_have_text("3 ready")
        expect(page.locator('[data-node="spare"]')).to_have_count(0)
        expect(page.locator(".events li").first).to_have_class("fresh")
        shown.board.put("spec", {"current": 1, "next": 2, "min": 2, "max": 6})
        shown.node("home", replica("r3", version=2), provider="bert")
        rollout = page.get_by_role("meter", name="Version 2 takes the place of version 1")
        expect(rollout).to_have_attribute("aria-valuetext", "1 of 3 replicas")
        expect(page.locator('[data-node="home"] .tag')).to_have_text("v2")


def test_an_endpoint_that_sleeps_says_so(browser: Browser, shown: Shown, parrot: Path) -> None:
    shown.board.put("spec", {"current": 1, "next": None, "min": 0, "max": 2})
    for name in ("a100-west", "home"):
        shown.node(name)
    with (
        showing(shown, settings_for(parrot), ready=False) as door,
        page_of(browser, f"{door.root}/") as page,
    ):
        expect(page.locator("#state")).to_have_text("Asleep")
        expect(page.locator("#banner")).to_contain_text("sleeps")
        fleet_of(page)
        expect(page.get_by_role("region", name="Fleet")).to_contain_text("A request wakes this endpoint")


def test_names_of_nodes_are_text_and_never_html(browser: Browser, door: Gateway, shown: Shown) -> None:
    evil = '<img src=x onerror="window.pwned = 1">'
    shown.node("home", replica("r3", "failed", why=evil), provider=evil)
    shown.happened("failed", evil)
    with page_of(browser, f"{door.root}/") as page:
        fleet_of(page)
        expect(page.locator(".events li").first).to_contain_text(evil)
        expect(page.locator('[data-node="home"]')).to_contain_text(evil)
        assert page.locator("#fleet img").count() == 0
        assert page.evaluate("window.pwned") is None


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_fleet_fits_on_a_phone(browser: Browser, door: Gateway, shown: Shown, scheme: str) -> None:
    shown.node("a-machine-with-a-long-name.of-a-provider.example", replica("r4"), provider="p" * 60)
    shown.happened("failed", "x" * 300)
    phone: dict[str, Any] = {**PHONE, "color_scheme": scheme}
    with page_of(browser, f"{door.root}/", **phone) as page:
        page.get_by_role("button", name="Fleet", exact=True).tap()
        expect(page.locator("[data-node]")).to_have_count(4)
        expect(page.get_by_label("Endpoint", exact=True)).not_to_be_visible()
        assert_fits(page)
        wide, own = page.locator("#fleet").evaluate("node => [node.scrollWidth, node.clientWidth]")
        assert wide <= own


def test_the_fleets_parts_have_names_and_nothing_moves_where_that_is_asked_for(browser: Browser, door: Gateway) -> None:
    with page_of(browser, f"{door.root}/", reduced_motion="reduce") as page:
        fleet_of(page)
        unnamed = """() => [...document.querySelectorAll("#fleet :is(button, [role=meter], [role=img], section)")]
            .filter((node) => !(node.ariaLabel || node.getAttribute("aria-labelledby") || node.textContent.trim()))
            .map((node) => node.outerHTML)"""
        assert page.evaluate(unnamed) == []
        assert page.evaluate("document.getAnimations().length") == 0


def test_without_a_fleet_there_is_no_fleet_view(browser: Browser, shown: Shown, parrot: Path) -> None:
    from tests.gateway.behind_gateway import gateway

    with gateway(settings_for(parrot)) as door, page_of(browser, f"{door.root}/") as page:
        expect(page.locator("#state")).to_have_text("Not ready")
        expect(page.get_by_role("button", name="Fleet", exact=True)).not_to_be_visible()
