"""A plain `EventSource` in a real browser, behind a line that is cut again and again."""

import asyncio
import contextlib
import random
import shutil
from urllib.parse import urlsplit

import httpx
import pytest

from shared.protocol import GenerationRequest, Message, SamplingParams
from shared.queue import Submission
from shared.store import Store, connect
from tests.gateway_process import GatewayProcess
from tests.scripted import ScriptedWorker
from tests.stack import ROOT

playwright = pytest.importorskip("playwright.async_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)

pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH"),
]

CUTS = 20
FETCH = ROOT / "clients" / "js" / "unbroken-fetch.js"
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]

PAGE = """<!doctype html><title>one session</title><script>
const kept = JSON.parse(sessionStorage.getItem("kept") || '{"text": "", "ids": [], "done": 0}');
const last = kept.ids[kept.ids.length - 1];
const place = last ? "?last_event_id=" + encodeURIComponent(last) : "";
const source = new EventSource("/v1/sessions/browsed/events" + place);
source.onmessage = (event) => {
  if (event.data === "[DONE]") {
    kept.done += 1;  // and it does not close: it is to stop by itself
  } else {
    kept.text += JSON.parse(event.data).choices[0].delta.content || "";
    kept.ids.push(event.lastEventId);
  }
  sessionStorage.setItem("kept", JSON.stringify(kept));
};
</script>"""


FETCHING = """<!doctype html><title>a chat</title><script type="module">
import { resumingFetch } from "./unbroken-fetch.js";
window.kept = { text: "", session: "", ended: "" };
window.ask = async () => {
  const send = resumingFetch(undefined, { backoffMs: 20, maxBackoffMs: 200 });
  const response = await send("/v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ stream: true, messages: [{ role: "user", content: "Tell me." }] }),
  });
  kept.session = response.headers.get("x-session-id");
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    kept.text += value;
  }
  kept.ended = "whole";
};
</script>"""


class CuttingProxy:
    """Passes TCP on to any gateway that lives, and cuts what is open when it is told to."""

    def __init__(self, gateways, seed):
        self.targets = [(urlsplit(g.url).hostname, urlsplit(g.url).port) for g in gateways]
        self.random = random.Random(seed)
        self.opened = self.cut_off = 0
        self._streams = {}  # a client's writer: whether it has got any of its stream
        self._cutting = False
        self._tasks = set()

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_exc):
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def cut(self):
        """Cut the stream once some of it has passed: at a random time, anywhere in its bytes."""
        while not any(self._streams.values()):
            await asyncio.sleep(0.01)
        await asyncio.sleep(self.random.random() * 0.3)
        before, self._cutting = self.cut_off, True
        while self.cut_off == before:
            await asyncio.sleep(0.01)

    async def _connect(self):
        for target in self.random.sample(self.targets, len(self.targets)):
            with contextlib.suppress(OSError):
                return await asyncio.open_connection(*target)
        raise ConnectionError("no gateway lives")

    async def _serve(self, reader, writer):
        self._tasks.add(asyncio.current_task())
        upstream = None
        self.opened += 1
        try:
            from_gateway, upstream = await self._connect()
            up = asyncio.ensure_future(_copy(reader, upstream))
            self._tasks.add(up)
            await self._down(from_gateway, writer)
        except OSError:
            pass
        finally:
            self._streams.pop(writer, None)
            for end in filter(None, (writer, upstream)):
                end.transport.abort()

    async def _down(self, reader, writer):
        while data := await reader.read(65536):
            if b"text/event-stream" in data:
                self._streams[writer] = False
            elif writer in self._streams:
                self._streams[writer] = True
            if self._cutting and self._streams.get(writer):
                writer.write(data[: self.random.randrange(len(data))])
                await writer.drain()
                self._cutting, self.cut_off = False, self.cut_off + 1
                return
            writer.write(data)
            await writer.drain()


async def _copy(reader, writer):
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()


async def speak(worker, claimed, enough):
    """Say a word every now and then until it is enough; returns the text."""
    words = []
    while not enough.is_set():
        words.append(f"wört{len(words)} ")
        await worker.say(claimed, words[-1])
        await asyncio.sleep(0.04)  # the pace of a model
    await worker.finish(claimed)
    return "".join(words)


@contextlib.asynccontextmanager
async def browser_page(url, html=PAGE):
    """Open the page as if the proxy served it, and the module beside it."""
    async with playwright.async_playwright() as driver:
        browser = await driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = await browser.new_page()
        await page.route(
            "**/page", lambda route: route.fulfill(body=html, content_type="text/html")
        )
        await page.route(
            "**/unbroken-fetch.js",
            lambda route: route.fulfill(path=FETCH, content_type="text/javascript"),
        )
        await page.goto(f"{url}/page")
        yield page
        await browser.close()


@pytest.fixture
async def worker(redis_url):
    store = Store(connect(redis_url))
    worker = ScriptedWorker(store)
    await worker.announce()
    yield worker
    await store.close()


@pytest.fixture
def gateways(redis_url, tmp_path):
    running = [GatewayProcess(redis_url, tmp_path) for _ in range(2)]
    yield running
    for gateway in running:
        gateway.kill()


async def begin(worker):
    """Queue the session as its first caller would have done, and claim it."""
    request = GenerationRequest((Message("user"),), SamplingParams())
    new = Submission("browsed", "", request.digest(), "org/tiny", "fp", False, request)
    await worker.queue.submit(new, 9)
    [claimed] = await worker.claim()
    return claimed


async def test_an_eventsource_has_the_whole_text_whatever_is_cut(worker, gateways):
    """20 cuts, a reload and a killed gateway: every event once, in order, and then it stops."""
    claimed, enough = await begin(worker), asyncio.Event()
    speaking = asyncio.create_task(speak(worker, claimed, enough))
    async with CuttingProxy(gateways, seed=7) as proxy, browser_page(proxy.url) as page:
        for number in range(CUTS):
            await proxy.cut()
            if number == CUTS // 2:
                gateways[0].kill()
            if number == 3 * CUTS // 4:
                await page.reload()
        enough.set()
        text = await speaking
        await page.wait_for_function("source.readyState === EventSource.CLOSED", timeout=60_000)
        kept = await page.evaluate("kept")
        requests = proxy.opened
        await asyncio.sleep(4)  # longer than a browser waits before it reconnects
    last = text.count(" ") + 1
    assert kept["ids"] == [f"browsed:{n}" for n in range(last + 1)]
    assert kept["text"] == text
    assert kept["done"] == 1
    assert proxy.cut_off == CUTS
    assert proxy.opened == requests


async def test_a_pages_resuming_fetch_reads_the_whole_stream(worker, gateways):
    """20 cuts and a killed gateway under a POST from a page: it reads the bytes of a replay."""
    enough = asyncio.Event()
    async with CuttingProxy(gateways, seed=11) as proxy, browser_page(proxy.url, FETCHING) as page:
        await worker.announce()  # opening a browser takes longer than an announcement holds
        await page.evaluate("() => void ask().catch((error) => (kept.ended = String(error)))")
        claimed = await worker.next()
        speaking = asyncio.create_task(speak(worker, claimed, enough))
        for number in range(CUTS):
            await proxy.cut()
            if number == CUTS // 2:
                gateways[0].kill()
        enough.set()
        text = await speaking
        await page.wait_for_function("kept.ended", timeout=60_000)
        kept = await page.evaluate("kept")
    assert (kept["ended"], proxy.cut_off) == ("whole", CUTS)
    async with httpx.AsyncClient(base_url=gateways[1].url, trust_env=False) as client:
        replay = await client.get(f"/v1/sessions/{kept['session']}/events")
    assert kept["text"] == replay.text
    assert replay.text.count("data: ") == text.count(" ") + 3
