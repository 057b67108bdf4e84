"""A Chromium without a window for the tests of the page: found on this machine, driven by Playwright."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

PROGRAMS = ("chromium-headless-shell", "chromium", "google-chrome", "google-chrome-stable", "chrome")
WHY_NOT = f"no Chromium on PATH ({', '.join(PROGRAMS)}) or in SCALELLM_CHROMIUM; as root: make browser"


def chromium() -> str | None:
    """The program, or None."""
    return os.environ.get("SCALELLM_CHROMIUM") or next(filter(None, map(shutil.which, PROGRAMS)), None)


@contextmanager
def running(program: str) -> Iterator[Browser]:
    """A browser for the length of a ``with`` block."""
    arguments = ["--disable-dev-shm-usage", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=arguments)
        yield browser
        browser.close()


@contextmanager
def page_of(browser: Browser, url: str, *, expected: tuple[str, ...] = (), **context: Any) -> Iterator[Page]:
    """A fresh page at ``url``; at the end AssertionError for an error in its console that has none of ``expected`` in
    it, for an exception in its scripts, and for a request to anybody but its own server.
    """
    with browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **context}) as opened:
        page = opened.new_page()
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda said: errors.append(said.text) if said.type in ("error", "warning") else None)
        page.on("request", lambda one: None if one.url.startswith(url) else errors.append(f"asks elsewhere: {one.url}"))
        page.set_default_timeout(20_000)
        page.goto(url)
        yield page
        assert [error for error in errors if not any(one in error for one in expected)] == []
