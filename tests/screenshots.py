"""Makes the pictures of the README: `python -m tests.screenshots [name…]`, in `docs/`.

`page` shows a real stack with the trained demo model, whose worker and gateway are killed
meanwhile; `phone` a real gateway, to which a script answers: the demo model knows no Markdown.
"""

from __future__ import annotations

import asyncio
import io
import sys
import tempfile
from pathlib import Path

from PIL import Image

import run
from shared.store import Store, connect
from tests.gateway_process import GatewayProcess
from tests.own_redis import OwnRedis
from tests.page_kit import ask, browser_context, count_through_kills, until, until_over
from tests.scripted import ScriptedWorker
from tests.stack import ROOT, Stack

DESKTOP = {"viewport": {"width": 900, "height": 700}}
PHONE = {"viewport": {"width": 360, "height": 700}, "device_scale_factor": 2}
LARGEST = 150_000  # bytes of a picture
ANSWER = """\
Three things keep a stream **whole**:

1. Each token goes to a *log* before anybody sees it.
2. A client resumes with `Last-Event-ID`:
   - on any gateway,
   - at any time.
3. Another worker goes on from the log.

```python
for event in resume(session, after=41):
    print(event.text, end="")
```
"""


async def picture(page, path):
    """Save what the page shows, as a PNG of at most 128 colours."""
    await page.wait_for_selector("#dot.ready")  # the gateway that was killed answers again
    drawn = Image.open(io.BytesIO(await page.screenshot()))
    drawn.convert("RGB").quantize(128).save(path, optimize=True)
    size = path.stat().st_size
    assert size <= LARGEST, f"{path} has {size} bytes"
    run.say(f"{path}: {size} bytes")


async def killed_twice(folder, path):
    """A count to 100 whose worker and whose gateway are killed."""
    env = {"MAX_STEPS_PER_SECOND": "25"}
    with Stack(folder / "data", workers=2, model=run.DEMO_MODEL, env=env) as stack:
        async with browser_context(**DESKTOP, color_scheme="light") as context:
            page = await context.new_page()
            await count_through_kills(page, stack)
            await until(page, "document.querySelector('.ticks .takeover')", 5)
            await picture(page, path)


async def markdown_on_a_phone(folder, path):
    """An answer in Markdown on a phone, in the dark."""
    server = OwnRedis(folder)
    gateway = GatewayProcess(server.url, folder)
    try:
        worker = ScriptedWorker(Store(connect(server.url)), "f3a91c", "a script")
        await worker.announce()
        async with browser_context(**PHONE, color_scheme="dark") as context:
            page = await context.new_page()
            await page.goto(gateway.url)
            await ask(page, "How does it survive?")
            claimed = await worker.next()
            for word in ANSWER.replace(" ", " \0").split("\0"):
                await worker.say(claimed, word)
            await worker.finish(claimed)
            await worker.announce()
            await until_over(page)
            await picture(page, path)
        await worker.store.close()
    finally:
        gateway.stop()
        server.kill()


PICTURES = {"page": killed_twice, "phone": markdown_on_a_phone}


def main() -> None:
    """Make those that are named, else all."""
    docs = ROOT / "docs"
    docs.mkdir(exist_ok=True)
    for name in sys.argv[1:] or PICTURES:
        with tempfile.TemporaryDirectory() as folder:
            asyncio.run(PICTURES[name](Path(folder), docs / f"{name}.png"))


if __name__ == "__main__":
    main()
