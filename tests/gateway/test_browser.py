"""The page in a real browser, in front of a real Triton: what a reader sees, with the keyboard and on a phone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Route, expect

from tests.conftest import unused_ports
from tests.e2e.served import Served
from tests.e2e.test_triton_models import CAPITAL, GREEK, Reference
from tests.gateway.behind_gateway import Gateway, gateway, settings_for
from tests.gateway.browser import WHY_NOT, chromium, page_of, running
from tests.gateway.test_doors import until_ready
from toolchain.gateway import keys
from toolchain.gateway.settings import EngineFacts, Limits, Settings, Timeouts

pytestmark = [pytest.mark.timeout(180), pytest.mark.skipif(chromium() is None, reason=WHY_NOT)]
PHONE = {"viewport": {"width": 360, "height": 780}, "device_scale_factor": 2, "is_mobile": True, "has_touch": True}
FACTS = EngineFacts(
    recipe="parrot",
    device="cpu",
    backend="openvino",
    architecture="LlamaForCausalLM",
    weights="none",
    kv="fp32",
    release=None,
    gpus=0,
    max_batch_size=16,
    digest="0123456789ab",
    verdict="passed",
    verdict_summary="perplexity ratio 1.001",
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = chromium()
    assert program is not None
    with running(program) as found:
        yield found


@pytest.fixture(scope="module")
def asked(parrot: Path, served: Served) -> Settings:
    found = settings_for(parrot, served.http_port)
    upstreams = tuple(replace(one, status_file=served.status_file) for one in found.upstreams)
    return replace(found, upstreams=upstreams, model=replace(found.model, engine=FACTS))


@pytest.fixture(scope="module")
def door(asked: Settings) -> Iterator[Gateway]:
    with gateway(asked) as found:
        until_ready(found)
        yield found


def opened(browser: Browser, door: Gateway, **how: Any) -> AbstractContextManager[Page]:
    return page_of(browser, f"{door.root}/", **how)


def say(page: Page, text: str, **parameters: str) -> None:
    """Type a message and send it with the keyboard; ``parameters`` by the names of their fields."""
    if parameters and not page.locator("#parameters").is_visible():
        page.get_by_role("button", name="Parameters").click()
    for name, value in parameters.items():
        page.locator(f"#{name}").fill(value)
    page.get_by_label("Message", exact=True).fill(text)
    page.get_by_label("Message", exact=True).press("Enter")


def last(page: Page) -> Any:
    return page.locator(".turn.model").last


def until(page: Page, true: str, timeout_s: float = 20) -> None:
    """Until an expression holds. Playwright's own way needs eval, which the page's policy forbids."""
    deadline = time.monotonic() + timeout_s
    while not page.evaluate(true):
        assert time.monotonic() < deadline, true
        page.wait_for_timeout(20)


def lengthen(route: Route) -> None:
    """The same request for an answer of some seconds."""
    body = json.loads(route.request.post_data or "{}")
    route.continue_(post_data=json.dumps({**body, "max_tokens": 5500, "min_tokens": 5400}))


def test_an_answer_is_the_models_text_with_its_numbers(browser: Browser, door: Gateway, reference: Reference) -> None:
    with opened(browser, door) as page:
        expect(page.locator("#state")).to_have_text("Ready")
        expect(page.get_by_label("Model")).to_have_value("parrot")
        say(page, CAPITAL, temperature="0", max_tokens="60")
        expect(last(page).locator(".prose")).to_have_text(reference.text(CAPITAL, 60).strip())
        prompt, answer = len(reference.tokenizer(CAPITAL).input_ids), len(reference.ids(CAPITAL, 60)[0])
        expect(last(page).locator(".numbers")).to_contain_text(f"{prompt} → {answer}")
        expect(last(page).locator(".numbers")).to_contain_text("TTFT")
        expect(last(page)).to_have_attribute("aria-busy", "false")
        expect(page.locator("#announce")).not_to_be_empty()
        assert page.locator("#prompt").evaluate("node => node === document.activeElement")


def test_an_answer_is_seen_to_grow_and_escape_stops_it_and_frees_the_engine(
    browser: Browser, door: Gateway, served: Served
) -> None:
    with opened(browser, door) as page:
        page.route("**/v1/chat/completions", lengthen)
        page.evaluate(
            """() => { window.seen = new Set(); new MutationObserver(() => {
                 const prose = document.querySelector(".prose");
                 if (prose?.textContent) window.seen.add(prose.textContent.length);
               }).observe(document.getElementById("log"), { childList: true, subtree: true, characterData: true }) }"""
        )
        say(page, GREEK)
        until(page, "window.seen.size >= 5")
        expect(last(page)).to_have_attribute("aria-busy", "true")
        expect(page.get_by_role("button", name="Stop")).to_be_visible()
        page.keyboard.press("Escape")
        expect(last(page).locator(".numbers")).to_contain_text("stopped")
        expect(page.get_by_role("button", name="Send")).to_be_visible()
        assert served.idle()["kv_usage_percent"] == 0
        lengths = page.evaluate("[...window.seen]")
        assert lengths == sorted(lengths)


def test_a_conversation_is_sent_whole_and_its_last_answer_can_be_asked_for_again(
    browser: Browser, door: Gateway
) -> None:
    with opened(browser, door) as page:
        bodies: list[Any] = []
        page.on("request", lambda one: bodies.append(one.post_data_json) if one.method == "POST" else None)
        say(page, "Count with me: one", temperature="0", max_tokens="3", seed="7", system="Be brief.")
        expect(page.locator(".turn.done")).to_have_count(1)
        first = page.locator(".prose").inner_text()
        say(page, "and more")
        expect(page.locator(".turn.done")).to_have_count(2)
        last(page).get_by_role("button", name="Answer again").click()
        until(page, "document.querySelectorAll('.turn.done').length === 2")
        expect(page.locator(".turn")).to_have_count(4)
        roles = [message["role"] for message in bodies[1]["messages"]]
        assert roles == ["system", "user", "assistant", "user"]
        assert bodies[1]["messages"][2]["content"].strip() == first.strip()
        assert bodies[1] == bodies[2]
        assert (bodies[1]["temperature"], bodies[1]["seed"], bodies[1]["max_tokens"]) == (0, 7, 3)
        assert "top_p" not in bodies[1]
        page.get_by_role("button", name="New chat").click()
        expect(page.locator(".turn")).to_have_count(0)


def test_html_in_questions_and_answers_is_shown_as_text(browser: Browser, door: Gateway) -> None:
    evil = '<img src=x onerror="window.pwned = 1"><script>window.pwned = 1</script>'
    answer = f"{evil}\n```html\n{evil}\n```\n`{evil}` **{evil}**"
    chunk = {"choices": [{"index": 0, "delta": {"content": answer}, "finish_reason": None}]}
    with opened(browser, door) as page:
        stream = f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n"
        page.route("**/v1/chat/completions", lambda route: route.fulfill(body=stream, content_type="text/event-stream"))
        say(page, evil)
        expect(page.locator(".turn.done")).to_have_count(1)
        expect(page.locator(".turn.user")).to_have_text(evil)
        expect(page.locator(".prose pre code")).to_have_text(evil)
        assert page.locator(".prose").inner_text().count(evil) == 4
        assert page.locator("#log :is(img, script)").count() == 0
        assert page.evaluate("window.pwned") is None


def test_scripts_of_others_and_inline_ones_do_not_run(browser: Browser, door: Gateway) -> None:
    with opened(browser, door, expected=("Content Security Policy", "Content-Security-Policy")) as page:
        page.evaluate(
            """() => { const one = document.createElement("script"); one.textContent = "window.pwned = 1";
                       document.body.append(one); document.body.setAttribute("onclick", "window.pwned = 1"); }"""
        )
        page.locator("h1").click()
        assert page.evaluate("window.pwned") is None


def test_a_key_is_asked_for_once_and_stays_in_the_tab(browser: Browser, asked: Settings, tmp_path: Path) -> None:
    secret = keys.add(tmp_path / "keys.json", "alice")
    with (
        gateway(replace(asked, keys=tmp_path / "keys.json")) as door,
        opened(browser, door, expected=("status of 401",)) as page,
    ):
        until_ready(door)
        expect(page.get_by_role("dialog", name="API key")).to_be_visible()
        expect(page.locator("#state")).to_have_text("Key needed")
        page.get_by_label("API key").last.fill("sk-wrong")
        page.keyboard.press("Enter")
        say(page, CAPITAL, temperature="0", max_tokens="5")
        expect(last(page)).to_contain_text("An API key is needed")
        expect(last(page)).to_contain_text("not known here")
        page.get_by_label("API key").last.fill(secret)
        page.keyboard.press("Enter")
        expect(page.locator(".turn.done")).to_have_count(1)  # the refused question is asked again by itself
        expect(page.locator("#state")).to_have_text("Ready")
        assert page.evaluate("Object.values(sessionStorage)") == [secret]
        assert page.evaluate("localStorage.length + document.cookie.length") == 0
        assert secret not in page.content()


def test_a_full_endpoint_says_when_to_come_again(browser: Browser, asked: Settings, served: Served) -> None:
    full = replace(asked, limits=Limits(max_running=1, max_queue=0))
    with gateway(full) as door, opened(browser, door, expected=("status of 429",)) as page:
        until_ready(door)
        with served.streaming("tensorrt_llm_bls", text_input=GREEK, max_tokens=10):
            pass  # the server is warm
        body = {"model": "parrot", "prompt": GREEK, "stream": True, "max_tokens": 5500, "min_tokens": 5400}
        taken = urllib.request.Request(f"{door.url}/completions", json.dumps(body).encode())
        with urllib.request.urlopen(taken) as held:
            held.readline()
            say(page, CAPITAL)
            expect(last(page)).to_contain_text("full just now")
            expect(last(page).get_by_role("button")).to_have_text("Try again in 1 s")
            expect(last(page).get_by_role("button")).to_be_disabled()
        served.idle()
        last(page).get_by_role("button", name="Try again", exact=True).click()
        expect(page.locator(".turn.done")).to_have_count(1)


def test_what_is_too_long_is_refused_in_words(browser: Browser, door: Gateway) -> None:
    with opened(browser, door, expected=("status of 400",)) as page:
        say(page, "long " * 4000)
        expect(last(page)).to_contain_text("Too long for this engine")
        say(page, CAPITAL, temperature="0", max_tokens="5")  # what was refused is not sent a second time
        expect(page.locator(".turn.done")).to_have_count(1)


def test_an_answer_that_breaks_off_keeps_what_came(browser: Browser, door: Gateway) -> None:
    chunk = {"choices": [{"index": 0, "delta": {"content": "Half of"}, "finish_reason": None}]}
    error = {"error": {"message": "the engine died", "type": "server_error", "param": None, "code": "upstream_error"}}
    stream = f"data: {json.dumps(chunk)}\n\ndata: {json.dumps(error)}\n\n"
    with opened(browser, door) as page:
        page.route("**/v1/chat/completions", lambda route: route.fulfill(body=stream, content_type="text/event-stream"))
        say(page, CAPITAL)
        expect(last(page).locator(".prose")).to_have_text("Half of")
        expect(last(page).get_by_role("alert")).to_contain_text("The answer was cut off")
        expect(last(page).get_by_role("alert")).to_contain_text("the engine died")


def test_an_endpoint_that_is_not_ready_says_so_and_a_request_ends_in_words(browser: Browser, asked: Settings) -> None:
    (nobody,) = unused_ports(1)
    dead = replace(
        asked,
        upstreams=(replace(asked.upstreams[0], http_url=f"http://127.0.0.1:{nobody}"),),
        timeouts=Timeouts(connect_s=1, patience_s=1),
    )
    with gateway(dead) as door, opened(browser, door, expected=("status of 503",)) as page:
        expect(page.locator("#state")).to_have_text("Not ready")
        expect(page.locator("#banner")).to_contain_text("No engine answers just now")
        expect(page.locator("#replicas .why")).to_be_visible()
        say(page, CAPITAL)
        expect(last(page)).to_contain_text("No engine is ready; the request waits for one")
        expect(last(page)).to_contain_text("The engine is not there")


def test_a_restart_is_seen_to_begin_and_to_end(browser: Browser, door: Gateway) -> None:
    with opened(browser, door) as page:
        expect(page.locator("#state")).to_have_text("Ready")

        def down(route: Route) -> None:
            told = route.fetch().json()
            lost = {**told["replicas"][0], "ready": False, "why_down": "it was killed", "kv_blocks": None}
            route.fulfill(json={**told, "ready": False, "replicas": [lost]})

        page.route("**/status", down)
        expect(page.locator("#state")).to_have_text("Restarting")
        expect(page.locator("#replicas")).to_contain_text("it was killed")
        page.unroute("**/status")
        expect(page.locator("#state")).to_have_text("Ready")
        expect(page.locator("#banner")).not_to_be_visible()


def test_a_gateway_that_is_gone_is_noticed(browser: Browser, asked: Settings) -> None:
    with gateway(asked) as door:
        held = opened(browser, door, expected=("ERR_CONNECTION", "Failed to fetch"))
        page = held.__enter__()
        expect(page.locator("#state")).not_to_have_text("Connecting")
    expect(page.locator("#state")).to_have_text("No answer")
    say(page, CAPITAL)
    expect(last(page)).to_contain_text("The gateway does not answer")
    held.__exit__(None, None, None)


def test_the_endpoints_state_is_shown_and_follows_the_requests(browser: Browser, door: Gateway) -> None:
    with opened(browser, door) as page:
        aside = page.get_by_label("Endpoint", exact=True)
        expect(aside.locator("#replicas")).to_contain_text(door.settings.upstreams[0].http_url.removeprefix("http://"))
        expect(aside.locator("#replicas")).to_contain_text("blocks")
        expect(aside.locator("#engine")).to_contain_text("perplexity ratio 1.001")
        expect(aside.get_by_role("meter", name="KV cache")).to_have_attribute("aria-valuemax", "625")
        say(page, CAPITAL, temperature="0", max_tokens="20")
        expect(page.locator(".turn.done")).to_have_count(1)
        tile = aside.locator(".tile", has_text="Time to first token")
        expect(tile.locator(".value")).to_contain_text("ms")
        expect(tile.get_by_role("img")).to_be_visible()
        aside.get_by_role("button", name="The last five minutes").click()
        expect(aside.get_by_role("button", name="The last five minutes")).to_have_attribute("aria-pressed", "true")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_a_phone(browser: Browser, door: Gateway, scheme: str) -> None:
    with opened(browser, door, color_scheme=scheme, **PHONE) as page:
        say(page, f"{'Donaudampfschifffahrt' * 12} {CAPITAL}", temperature="0", max_tokens="30")
        expect(page.locator(".turn.done")).to_have_count(1)
        assert_fits(page)
        page.get_by_role("button", name="Code", exact=True).click()
        assert_fits(page)
        page.keyboard.press("Escape")
        expect(page.get_by_label("Endpoint", exact=True)).not_to_be_visible()
        page.get_by_role("button", name="Endpoint").tap()
        expect(page.get_by_label("Endpoint", exact=True)).to_be_visible()
        expect(page.get_by_label("Message", exact=True)).not_to_be_visible()
        assert_fits(page)
        light = sum(map(int, page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g)")))
        assert (light > 600) if scheme == "light" else (light < 100)


def assert_fits(page: Page) -> None:
    wide, own = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert wide <= own
    assert page.evaluate("window.innerWidth") == PHONE["viewport"]["width"]  # type: ignore[index]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(browser: Browser, door: Gateway, scheme: str) -> None:
    """WCAG 2.2, 1.4.3: a contrast of 4.5, computed here from the colors that the browser gives."""
    pairs = {
        "ink": ("paper", "panel", "raised", "bubble"),
        "soft": ("paper", "panel", "raised", "bubble", "bad-tint", "warn-tint"),
        "faint": ("paper", "panel", "raised", "bad-tint"),
        "accent": ("paper",),
        "accent-ink": ("accent",),
        "good": ("panel",),
        "warn": ("panel",),
        "bad": ("bad-tint",),
    }
    with opened(browser, door, color_scheme=scheme) as page:
        style = "name => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim()"
        for text, grounds in pairs.items():
            for ground in grounds:
                ratio = contrast(page.evaluate(style, text), page.evaluate(style, ground))
                assert ratio >= 4.5, (text, ground, ratio)


def contrast(one: str, other: str) -> float:
    bright, dim = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


def luminance(color: str) -> float:
    channels = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_everything_has_a_name_and_shift_enter_is_a_new_line(browser: Browser, door: Gateway) -> None:
    with opened(browser, door, reduced_motion="reduce") as page:
        say(page, CAPITAL, temperature="0", max_tokens="5")
        expect(page.locator(".turn.done")).to_have_count(1)
        unnamed = """() => [...document.querySelectorAll("button, input, select, textarea, [role=meter], [role=img]")]
            .filter((node) => !(node.ariaLabel || node.textContent.trim() || node.labels?.length))
            .map((node) => node.outerHTML)"""
        assert page.evaluate(unnamed) == []
        box = page.get_by_label("Message", exact=True)
        box.fill("one")
        box.press("Shift+Enter")
        box.press_sequentially("two")
        expect(box).to_have_value("one\ntwo")
        expect(page.locator(".turn.user")).to_have_count(1)
        assert page.evaluate("document.getAnimations().length") == 0


@pytest.mark.parametrize("language", ["curl", "Python"])
def test_the_request_as_code_asks_the_same(
    browser: Browser, door: Gateway, reference: Reference, language: str
) -> None:
    program = ["bash", "-c"] if language == "curl" else [sys.executable, "-c"]
    with opened(browser, door) as page:
        say(page, CAPITAL, temperature="0", max_tokens="40", system="")
        expect(page.locator(".turn.done")).to_have_count(1)
        last(page).get_by_role("button", name="This request as code").click()
        page.get_by_role("button", name=language, exact=True).click()
        code = page.locator("#code").inner_text()
    done = subprocess.run([*program, code], capture_output=True, text=True, timeout=60, check=True)
    text = done.stdout
    if language == "curl":
        lines = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        text = "".join(one["choices"][0]["delta"].get("content") or "" for one in lines if one["choices"])
    assert text == reference.text(CAPITAL, 40)


def test_the_code_keeps_quotes_as_they_are(browser: Browser, door: Gateway, tmp_path: Path) -> None:
    """Read back by the programs that the code is for."""
    said = 'it\'s "$HOME" `id` \\n é 😀'
    with opened(browser, door) as page:
        page.get_by_label("Message", exact=True).fill(said)
        page.get_by_role("button", name="Code", exact=True).click()
        curl = page.locator("#code").inner_text()
        page.get_by_role("button", name="Python", exact=True).click()
        python = page.locator("#code").inner_text()
    (tmp_path / "curl").write_text('#!/bin/sh\nfor last; do :; done\nprintf %s "$last"\n')
    (tmp_path / "curl").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    seen = subprocess.run(["bash", "-c", curl], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(seen.stdout)["messages"][0]["content"] == said
    (messages,) = [line for line in python.splitlines() if line.strip().startswith("messages=")]
    assert eval(messages.strip().rstrip(",").removeprefix("messages="))[0]["content"] == said


def test_several_pages_at_once_do_not_disturb_each_other(browser: Browser, door: Gateway) -> None:
    with opened(browser, door) as one, opened(browser, door) as other:
        say(one, CAPITAL, temperature="0", max_tokens="40")
        say(other, GREEK, temperature="0", max_tokens="40")
        expect(one.locator(".turn.done .prose")).to_contain_text("Seine")
        expect(other.locator(".turn.done .prose")).to_contain_text("delta")
