"""The README's pictures of the page, in two steps.

    python scripts/screenshots.py model /tmp/by-heart        # a small Llama that knows a few conversations by heart
    scalellm build --recipe tiny --model /tmp/by-heart && scalellm serve --recipe tiny --gateway &
    python scripts/screenshots.py pictures http://127.0.0.1:8080/

The pictures are of the page and not of a model, hence answers by heart; everything else in them is as it was measured.
Some readers ask all the while, so that the curves are those of real requests. Gives ``page-light.png`` and
``page-dark.png`` (1280 x 800), ``page-phone-chat.png`` and ``page-phone-endpoint.png`` (390 x 844), in 256 colors. Of
an endpoint over several nodes (``scalellm deploy``): ``fleet-light.png``, ``fleet-dark.png`` and ``fleet-phone.png``.
Needs the ``dev`` extra and a Chromium (``make browser``). The font is Inter where it is there (Debian: fonts-inter).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import io
import json
import os
import random
import shutil
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

PROGRAMS = ("chromium-headless-shell", "chromium", "google-chrome")
TALKS = (
    (
        "What is the KV cache?",
        "The memory in which a model keeps the **keys and values** of earlier tokens, so that it need not read the "
        "whole text again for each new one.",
        "How many blocks do 1,000 tokens take?",
        "With blocks of 32 tokens, 32 of them:\n\n```python\nblocks = -(-1000 // 32)  # 32, the last one partly empty\n"
        "```\n\nBlocks are given out as a sequence grows and freed when it ends.",
    ),
    (
        "Explain quantization.",
        "Weights are stored with fewer bits: four instead of sixteen. The model then needs a quarter of the memory, "
        "and since writing a token means reading every weight once, it also answers faster.",
    ),
    (
        "What is throughput?",
        "The tokens that a server makes in one second, for all of its readers together.",
    ),
)
"""Questions and answers in turn."""
WHO = ("user", "bot") * 2
READERS = 6


def learn(folder: Path) -> None:
    """Train the small Llama until it knows ``TALKS``: seconds on an idle core."""
    import make_tiny_llama as tiny
    import torch

    args = tiny.parse([str(folder), "--layers", "2", "--hidden", "128", "--vocab", "512"])
    texts = [tiny.as_chat("\n".join(f"{who}: {text}" for who, text in zip(WHO, talk, strict=False))) for talk in TALKS]
    tokenizer = tiny.train_tokenizer(texts, args.vocab)
    args.vocab = len(tokenizer)
    tokenizer.model_max_length = tiny.MAX_POSITIONS
    model = tiny.new_model(args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    for _step in range(500):
        loss = model(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss.item() < 0.005:
            break
    print(f"loss {loss.item():.4f}")
    tiny.save(model, tokenizer, folder)


@contextmanager
def readers(url: str) -> Iterator[None]:
    """Others who ask all the while."""
    gone = threading.Event()

    def read(seed: int) -> None:
        dice, model = random.Random(seed), model_at(url)
        while not gone.is_set():
            body = {
                "model": model,
                "messages": [{"role": "user", "content": dice.choice(TALKS)[0]}],
                "max_tokens": 900,
                "min_tokens": dice.randint(150, 900),
                "stream": True,
            }
            request = urllib.request.Request(f"{url}v1/chat/completions", json.dumps(body).encode())
            with urllib.request.urlopen(request) as answer:
                answer.read()
            gone.wait(dice.uniform(0.3, 2.5))

    with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
        found = [pool.submit(read, seed) for seed in range(READERS)]
        try:
            yield
        finally:
            gone.set()
        for one in found:
            one.result()


def model_at(url: str) -> str:
    with urllib.request.urlopen(f"{url}v1/models") as answer:
        return str(json.load(answer)["data"][0]["id"])


def is_fleet(url: str) -> bool:
    with urllib.request.urlopen(f"{url}status") as answer:
        return json.load(answer)["fleet"] is not None


def talk(page: Page) -> None:
    """The first conversation, answered greedily."""
    page.get_by_role("button", name="Parameters").click()
    page.locator("#temperature").fill("0")
    page.locator("#max_tokens").fill("200")
    page.get_by_role("button", name="Parameters").click()
    for number, question in enumerate(TALKS[0][::2], 1):
        page.get_by_label("Message", exact=True).fill(question)
        page.keyboard.press("Enter")
        page.locator(".turn.done").nth(number - 1).wait_for()
    page.mouse.move(0, 0)
    page.wait_for_timeout(2500)  # until the status has been asked for again


def shot(browser: Browser, url: str, scheme: str, size: tuple[int, int], *views: str) -> list[Image.Image]:
    width, height = size
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=scheme, device_scale_factor=2, is_mobile=width < 600
    )
    page = context.new_page()
    page.goto(url)
    page.locator("#state[data-state=ready]").wait_for()
    talk(page)
    pictures = []
    for view in views or ("",):
        if view:
            page.get_by_role("button", name=view, exact=True).click()
            page.wait_for_timeout(300)
        pictures.append(Image.open(io.BytesIO(page.screenshot())).convert("RGB"))
    context.close()
    return pictures


def save(picture: Image.Image, file: Path) -> None:
    picture.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(file, optimize=True)
    print(f"{file}  {picture.width} x {picture.height}, {file.stat().st_size / 1000:.0f} kB")


def take(url: str, out: Path, seconds: float) -> None:
    """All pictures, after ``seconds`` of requests."""
    program = os.environ.get("SCALELLM_CHROMIUM") or next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        sys.exit("no Chromium here; as root: make browser")
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with readers(url), sync_playwright() as playwright:
        time.sleep(seconds)
        browser = playwright.chromium.launch(executable_path=program, args=arguments)
        if is_fleet(url):
            for scheme in ("light", "dark"):
                save(shot(browser, url, scheme, (1440, 900), "Fleet")[0], out / f"fleet-{scheme}.png")
            save(shot(browser, url, "light", (390, 844), "Fleet")[0], out / "fleet-phone.png")
            return browser.close()
        for scheme in ("light", "dark"):
            save(shot(browser, url, scheme, (1280, 800))[0], out / f"page-{scheme}.png")
        chat, endpoint = shot(browser, url, "light", (390, 844), "Chat", "Endpoint")
        save(chat, out / "page-phone-chat.png")
        save(endpoint, out / "page-phone-endpoint.png")
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    model = verbs.add_parser("model", help="train the small Llama")
    model.add_argument("folder", type=Path)
    pictures = verbs.add_parser("pictures", help="take the pictures")
    pictures.add_argument("url", help="of the page, with the slash at its end")
    pictures.add_argument("--out", type=Path, default=Path("docs"), metavar="DIR")
    pictures.add_argument("--seconds", type=float, default=290, help="of requests before the pictures (default 290)")
    given = parser.parse_args()
    if given.verb == "model":
        learn(given.folder)
    else:
        take(given.url, given.out, given.seconds)


if __name__ == "__main__":
    main()
