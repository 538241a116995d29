"""Makes the pictures of the README: `python -m tests.screenshots [folder]` (default `docs`).

They show a real stack with the trained demo model, whose worker and gateway are killed meanwhile.
"""

from __future__ import annotations

import asyncio
import io
import sys
import tempfile
from pathlib import Path

from PIL import Image

import run
from tests.page_kit import ask, browser_context, until, until_over
from tests.stack import ROOT, Stack

DESKTOP = {"viewport": {"width": 900, "height": 700}}
PHONE = {"viewport": {"width": 360, "height": 700}, "device_scale_factor": 2}


async def picture(page, path):
    """Save what the page shows, as a PNG of at most 128 colours."""
    drawn = Image.open(io.BytesIO(await page.screenshot()))
    drawn.convert("RGB").quantize(128).save(path, optimize=True)


async def killed_twice(url, control, path):
    """A count to 100 whose worker and whose gateway are killed."""
    async with browser_context(**DESKTOP, color_scheme="light") as context:
        page = await context.new_page()
        await page.goto(url)
        await page.wait_for_selector("#controls:not([hidden])")
        await ask(page, "Count from 1 to 100.")
        for part, events in (("worker", 60), ("gateway", 130)):
            await until(page, f"document.querySelectorAll('.ticks i').length > {events}", 60)
            await page.click(f"[data-kill={part}]")
        await until(page, "document.querySelector('.ticks .takeover')", 60)
        await until_over(page, 90)
        await picture(page, path)


async def on_a_phone(url, path):
    """An image on a phone, in the dark."""
    async with browser_context(**PHONE, color_scheme="dark") as context:
        page = await context.new_page()
        await page.goto(url)
        await page.get_by_role("button", name="What colour is this image?").click()
        await until_over(page, 60)
        await picture(page, path)


def main() -> None:
    """Make them all."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "docs")
    folder.mkdir(exist_ok=True)
    env = {"MAX_STEPS_PER_SECOND": "25"}
    with (
        tempfile.TemporaryDirectory() as data,
        Stack(Path(data) / "data", workers=2, model=run.DEMO_MODEL, env=env) as stack,
    ):
        asyncio.run(killed_twice(stack.url, folder / "page.png"))
        asyncio.run(on_a_phone(stack.url, folder / "phone.png"))


if __name__ == "__main__":
    main()
