"""A real browser on the page at `/`, for tests and for the screenshots of the README."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time

import pytest

playwright = pytest.importorskip("playwright.async_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]


@contextlib.asynccontextmanager
async def browser_context(**options):
    """Open a browser whose pages may request nothing but loopback; fails on a script's error."""
    async with playwright.async_playwright() as driver:
        browser = await driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        context = await browser.new_context(**options)
        elsewhere, errors = [], []
        context.on("request", lambda r: _is_elsewhere(r.url) and elsewhere.append(r.url))
        context.on("weberror", lambda error: errors.append(str(error.error)))
        yield context
        await browser.close()
        assert not elsewhere, elsewhere
        assert not errors, errors


def _is_elsewhere(url):
    return not url.startswith(("http://127.0.0.1", "http://localhost", "data:", "blob:"))


async def ask(page, text):
    """Type a message and send it with Enter."""
    await page.fill("#prompt", text)
    await page.press("#prompt", "Enter")


async def text_of(page, selector=".answer .text"):
    """Return the text of the last such element."""
    return await page.locator(selector).last.text_content()


async def until(page, condition, seconds=20, arg=None):
    """Wait until a JavaScript expression, or a function of `arg`, is true."""
    deadline = time.monotonic() + seconds  # the page's policy forbids the driver's own waiting
    while not await page.evaluate(condition, arg):
        assert time.monotonic() < deadline, f"not within {seconds} s: {condition}"
        await asyncio.sleep(0.02)


async def until_said(page, text, seconds=20):
    """Wait until the last answer holds this text."""
    last = "[...document.querySelectorAll('.answer .text')].pop()"
    await until(page, f"text => {last}?.textContent.includes(text)", seconds, text)


async def until_over(page, seconds=20):
    """Wait until no answer is under way."""
    over = "document.querySelector('.answer') && !document.querySelector('.answer.live')"
    await until(page, over, seconds)


async def count_through_kills(page, stack):
    """Let the page count to 100, and kill worker and gateway with its buttons; until it is over."""
    await page.goto(f"{stack.url}/#control={stack.state['control']}")
    await page.wait_for_selector("#controls:not([hidden])")
    await ask(page, "Count from 1 to 100.")
    for part, events in (("worker", 60), ("gateway", 130)):
        await until(page, f"document.querySelectorAll('.ticks i').length > {events}", 60)
        await page.click(f"[data-kill={part}]")
    await until_over(page, 90)
