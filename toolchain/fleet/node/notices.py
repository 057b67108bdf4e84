"""Whether this rented machine is about to be taken away: its cloud's metadata server, asked every few seconds.

What each cloud's server is asked, and what it answers, stands in ``facts/spot_notices.yaml``. What is then done is the
caller's concern.
"""

from __future__ import annotations

import http.client
import json
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

from toolchain import workspace
from toolchain.errors import RecipeError

_EVERY_S = 5.0
"""As AWS recommends: https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html."""
_TIMEOUT_S = 2.0
_MOST_BYTES = 64 * 1024
_UNAUTHORIZED = frozenset({401, 403})


def clouds() -> tuple[str, ...]:
    """Those whose notices are known."""
    return tuple(workspace.facts("spot_notices"))


class Notices:
    """One cloud's metadata server; ``url`` instead of the usual one."""

    def __init__(self, cloud: str, url: str = "") -> None:
        """Raises RecipeError for a cloud that is not known."""
        known: Mapping[str, Any] = workspace.facts("spot_notices")
        if cloud not in known:
            raise RecipeError(f"{cloud}: its notices are not known", hint=f"one of {', '.join(known)}")
        self._fact = known[cloud]
        self._url = (url or self._fact["url"]).rstrip("/")
        self._session, self._own = "", ""

    def look(self) -> str:
        """The notice's text; empty where there is none, or nobody answers."""
        try:
            found = self._ask(self._fact["path"])
            if own := self._fact.get("own"):
                self._own = self._own or self._ask(own).strip()
                found = _of(found, self._own)
        except (OSError, http.client.HTTPException, ValueError):  # HTTPError is an OSError
            return ""
        return found.strip() if re.search(self._fact["pattern"], found, re.MULTILINE) else ""

    def watch(self, until: threading.Event, on_notice: Callable[[str], None], every_s: float = _EVERY_S) -> None:
        """Until the first notice, which is told, or until ``until`` is set."""
        while not until.is_set():
            if notice := self.look():
                on_notice(notice)
                return
            until.wait(every_s)

    def _ask(self, path: str) -> str:
        session = self._fact.get("session")
        if session and not self._session:
            self._session = self._fetch(session["path"], session["headers"], "PUT")
        headers = {**self._fact.get("headers", {}), **({session["sends"]: self._session} if session else {})}
        try:
            return self._fetch(path, headers, "GET")
        except urllib.error.HTTPError as error:
            if error.code in _UNAUTHORIZED:
                self._session = ""  # it has run out
            raise

    def _fetch(self, path: str, headers: Mapping[str, str], method: str) -> str:
        request = urllib.request.Request(f"{self._url}{path}", headers=dict(headers), method=method)
        with _DIRECT.open(request, timeout=_TIMEOUT_S) as answer:
            raw: bytes = answer.read(_MOST_BYTES)
        return raw.decode("utf-8", "replace")


_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""A metadata server is never behind a proxy."""


def _of(raw: str, own: str) -> str:
    """The events that name this machine. Raises ValueError for what is none."""
    events = json.loads(raw).get("Events", [])
    return json.dumps({"Events": [one for one in events if own in one.get("Resources", [])]})
