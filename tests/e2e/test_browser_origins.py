"""A page of another origin in a real browser: CORS, and a signed stream URL for `EventSource`."""

import asyncio
import contextlib

import pytest

from tests.client_kit import Script, status
from tests.e2e import test_browser
from tests.gateway_process import GatewayProcess
from tests.scripted import ScriptedWorker

pytestmark = test_browser.pytestmark

PAGE = """<!doctype html><title>elsewhere</title><script>
window.heard = [];
window.ask = async (gateway) => {
  const headers = { Authorization: "Bearer page-key", "Content-Type": "application/json" };
  const body = JSON.stringify({
    stream: true, session_id: "paged", messages: [{ role: "user", content: "Hi" }],
  });
  const posted = await fetch(`${gateway}/v1/chat/completions`, { method: "POST", headers, body });
  const id = posted.headers.get("x-session-id");
  await posted.body.cancel();
  const signing = { method: "POST", headers };
  const signed = await fetch(`${gateway}/v1/sessions/${id}/stream_url`, signing);
  window.source = new EventSource(gateway + (await signed.json()).url);
  source.onmessage = (event) => heard.push(event.data);
  return id;
};
</script>"""


@contextlib.asynccontextmanager
async def elsewhere():
    """Serve the page, from a loopback address as the gateways', and open it; gives its origin."""
    head = status("200 OK", "content-type: text/html", "connection: close")
    answer = head.replace(b"content-length: 0", b"content-length: %d" % len(PAGE)) + PAGE.encode()
    async with (
        Script(*[answer] * 3) as server,
        test_browser.playwright.async_playwright() as driver,
    ):
        browser = await driver.chromium.launch(
            executable_path=test_browser.CHROMIUM, args=test_browser.FLAGS
        )
        page = await browser.new_page()
        await page.goto(f"{server.url}/page")
        yield page, server.url
        await browser.close()


@pytest.fixture
def worker(store):
    return ScriptedWorker(store)


async def test_a_page_elsewhere_reads_by_a_signed_url(redis_url, worker, tmp_path):
    """With its origin named, it may post with a key and listen without one; else it may not."""
    env = {"API_KEYS": "page-key", "STREAM_URL_SECRET": "s"}
    async with elsewhere() as (page, origin):
        gateways = [
            GatewayProcess(redis_url, tmp_path, {**env, "CORS_ORIGINS": origins})
            for origins in (origin, "http://other.example")
        ]
        try:
            await worker.announce()
            assert await page.evaluate("ask", gateways[0].url) == "paged"
            while not (claimed := await worker.claim()):
                await asyncio.sleep(0.01)
            await worker.say(claimed[0], "heard")
            await worker.finish(claimed[0])
            await page.wait_for_function("heard.includes('[DONE]')")
            await page.wait_for_function("source.readyState === EventSource.CLOSED")
            assert sum('"heard"' in data for data in await page.evaluate("heard")) == 1
            refused = "(url) => ask(url).then(() => 'let in', (error) => error.name)"
            assert await page.evaluate(refused, gateways[1].url) == "TypeError"
        finally:
            for gateway in gateways:
                gateway.kill()
