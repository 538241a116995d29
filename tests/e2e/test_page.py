"""The page at `/` in a real browser: chat, and the promise that it makes visible."""

import asyncio
import json
import re

import httpx
import pytest

from shared.store import Store, connect
from tests.gateway_process import GatewayProcess
from tests.media_samples import encode, picture
from tests.page_kit import CHROMIUM, ask, browser_context, text_of, until, until_over, until_said
from tests.scripted import ScriptedWorker

pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH"),
]
PHONE = {"viewport": {"width": 360, "height": 720}, "device_scale_factor": 2}


@pytest.fixture
async def worker(redis_url):
    store = Store(connect(redis_url))
    worker = ScriptedWorker(store, "aaaaaa0000")
    await worker.announce()

    async def announce():
        while True:
            await worker.announce()
            await asyncio.sleep(1)

    announcing = asyncio.create_task(announce())
    yield worker
    announcing.cancel()
    await store.close()


@pytest.fixture
def gateway(redis_url, tmp_path):
    running = GatewayProcess(redis_url, tmp_path)
    yield running
    running.kill()


@pytest.fixture
async def context():
    async with browser_context() as context:
        yield context


async def claim(worker):
    """Wait for a session, and claim it."""
    while True:
        if claimed := await worker.claim():
            return claimed[0]
        await asyncio.sleep(0.02)


async def renew(worker, claimed):
    """Keep a lease for as long as a test takes."""
    while True:
        await worker.queue.renew({claimed.session_id: claimed.lease})
        await asyncio.sleep(0.5)


async def begin(page, worker, text="Hello"):
    """Ask, claim, and keep the lease; the returned task ends it."""
    await ask(page, text)
    claimed = await claim(worker)
    return claimed, asyncio.create_task(renew(worker, claimed))


async def test_chat_shows_thought_answer_and_every_event(gateway, worker, context):
    """A message is sent with Enter; thought, answer, events, gateway and worker are shown."""
    page = await context.new_page()
    await page.goto(gateway.url)
    claimed, renewing = await begin(page, worker)
    await worker.say(claimed, "let me see", "reasoning")
    for word in ("good ", "morning ", "<b>you</b>"):
        await worker.say(claimed, word)
    await until_said(page, "you")
    await until(page, "document.querySelector('.last').textContent.includes('worker aaaaaa')")
    assert re.search(r"#4 · \+\d+ ms · gateway \w{6}", await text_of(page, ".last"))
    await worker.finish(claimed)
    await until_over(page)
    renewing.cancel()
    assert await text_of(page) == "good morning <b>you</b>"
    assert await text_of(page, ".thought p") == "let me see"
    assert not await page.locator(".thought").evaluate("node => node.open")
    assert "whole: 0 to 5, none lost, none twice" in await text_of(page, ".last")
    assert await page.locator(".ticks i").count() == 6


async def test_an_image_is_sent_with_the_message(gateway, worker, context):
    """A file that was chosen, dropped or pasted is shown and goes into the request."""
    page = await context.new_page()
    await page.goto(gateway.url)
    data = encode(picture())
    await page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": data})
    await page.wait_for_selector("#attached img")
    for kind, name in (("drop", "dataTransfer"), ("paste", "clipboardData")):
        await page.evaluate(
            """([kind, name]) => {
              const data = new DataTransfer();
              data.items.add(new File(["GIF89a"], kind + ".gif", {type: "image/gif"}));
              const event = new Event(kind, {bubbles: true, cancelable: true});
              Object.defineProperty(event, name, {value: data});
              document.querySelector("#prompt").dispatchEvent(event);
            }""",
            [kind, name],
        )
    await until(page, "document.querySelectorAll('#attached img').length === 3")
    await page.get_by_label("Remove image 3").click()
    await ask(page, "What is this?")
    claimed = await claim(worker)
    request = (await worker.queue.request(claimed.session_id)).decode()
    assert request.count('"kind":"image"') == 2
    assert "What is this?" in request
    assert await page.locator(".question img").count() == 2
    await worker.finish(claimed)
    await until_over(page)


async def test_stop_ends_the_generation(gateway, worker, context):
    """The stop button, and Escape, cancel the session on the server."""
    page = await context.new_page()
    await page.goto(gateway.url)
    await ask(page, "Hello")
    await page.locator("#stop").click()
    await until_over(page)
    await ask(page, "Hello again")
    await page.wait_for_selector("#stop:visible")
    await page.keyboard.press("Escape")
    await until_over(page)
    assert await text_of(page, "#notice") == "Stopped."
    assert await worker.claim(5) == []
    assert await page.locator("#send").is_visible()


async def test_a_reload_in_the_middle_goes_on(gateway, worker, context):
    """After a reload the question stands there, and the answer is whole."""
    page = await context.new_page()
    await page.goto(gateway.url)
    claimed, renewing = await begin(page, worker, "Count, please.")
    for number in range(10):
        await worker.say(claimed, f"{number} ")
    await until_said(page, "9 ")
    await page.reload()
    for number in range(10, 20):
        await worker.say(claimed, f"{number} ")
    await worker.finish(claimed)
    await until_over(page)
    renewing.cancel()
    assert await text_of(page) == "".join(f"{number} " for number in range(20))
    assert await text_of(page, ".question p") == "Count, please."
    await page.reload()
    assert await text_of(page) == "".join(f"{number} " for number in range(20))


async def test_a_second_tab_follows_by_the_link(gateway, worker, context):
    """The session's address in another tab shows the same answer, as an `EventSource`."""
    page = await context.new_page()
    await page.goto(gateway.url)
    claimed, renewing = await begin(page, worker)
    await worker.say(claimed, "both ")
    await until_said(page, "both ")
    second = await context.new_page()
    asked = []
    second.on("request", lambda r: asked.append((r.resource_type, r.url)))
    await second.goto(page.url)
    await until_said(second, "both ")
    await worker.say(claimed, "see this")
    await worker.finish(claimed)
    for tab in (page, second):
        await until_over(tab)
        assert await text_of(tab) == "both see this"
    renewing.cancel()
    assert any(kind == "eventsource" for kind, _ in asked)


async def test_a_killed_gateway_is_seen_and_survived(gateway, worker, context):
    """The stream resumes where it was, on the gateway's successor, and the strip says so."""
    page = await context.new_page()
    await page.goto(gateway.url)
    claimed, renewing = await begin(page, worker)
    await worker.say(claimed, "before ")
    await until_said(page, "before ")
    gateway.kill()
    await worker.say(claimed, "meanwhile ")
    await until(page, "document.querySelector('.last').textContent.includes('resuming')")
    gateway.start()
    await worker.say(claimed, "after")
    await until_said(page, "after")
    await worker.finish(claimed)
    await until_over(page)
    renewing.cancel()
    assert await text_of(page) == "before meanwhile after"
    assert re.search(r"resumed after #1 · gateway \w{6}", await text_of(page, ".ticks b"))
    assert "1 resume" in await text_of(page, ".told")


async def test_a_takeover_is_seen(gateway, worker, context):
    """When another worker goes on, the strip names it."""
    page = await context.new_page()
    await page.goto(gateway.url)
    await ask(page, "Hello")
    claimed = await claim(worker)
    await worker.say(claimed, "one ")
    await until(page, "document.querySelector('.last').textContent.includes('worker aaaaaa')")
    other = ScriptedWorker(worker.store, "bbbbbb1111")
    claimed = await claim(other)  # once the lease has run out
    renewing = asyncio.create_task(renew(other, claimed))
    await other.say(claimed, "two")
    await page.wait_for_selector(".ticks .takeover")
    await other.finish(claimed)
    await until_over(page)
    renewing.cancel()
    assert await text_of(page) == "one two"
    assert await text_of(page, ".ticks .takeover") == "worker bbbbbb took over"


async def test_everything_works_by_keyboard(gateway, worker, context):
    """From a fresh page: settings, a message, copying the request, without a pointer."""
    page = await context.new_page()
    await page.goto(gateway.url)
    await page.wait_for_selector("#dot.ready")

    async def tab_to(selector):
        for _ in range(40):
            if await page.evaluate("s => document.activeElement.matches(s)", selector):
                return
            await page.keyboard.press("Tab")
        pytest.fail(f"{selector} cannot be reached")

    await tab_to("#show-settings")
    await page.keyboard.press("Enter")
    await tab_to("[name=temperature]")
    await page.keyboard.type("0.5")
    await page.keyboard.press("Enter")
    await tab_to("#prompt")
    await page.keyboard.type("Hi")
    await page.keyboard.press("Enter")
    claimed = await claim(worker)
    assert (
        json.loads(await worker.queue.request(claimed.session_id))["sampling"]["temperature"] == 0.5
    )
    await worker.say(claimed, "hi")
    await worker.finish(claimed)
    await until_over(page)
    await context.grant_permissions(["clipboard-read", "clipboard-write"])
    for what, expected in (("link", "#session=chatcmpl-"), ("curl", '"content":"Hi"')):
        await tab_to(f"[data-copy={what}]")
        await page.keyboard.press("Enter")
        assert expected in await page.evaluate("navigator.clipboard.readText()")


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_it_fits_a_phone_and_can_be_read(gateway, worker, scheme):
    """At 360 px nothing is cut off; text has a contrast of 4.5 at least, light and dark."""
    async with browser_context(**PHONE, color_scheme=scheme) as context:
        page = await context.new_page()
        await page.goto(gateway.url)
        await page.wait_for_selector("#dot.ready")
        await fits(page)
        assert await faint(page) == []
        claimed, renewing = await begin(page, worker, "Wide" * 60)
        await worker.say(claimed, "hm", "reasoning")
        await worker.say(claimed, "word" * 100)
        await worker.finish(claimed)
        await until_over(page)
        renewing.cancel()
        await fits(page)
        assert await faint(page) == []
        for dialog in ("settings", "status"):
            await page.click(f"#show-{dialog}")
            await page.wait_for_selector(f"#{dialog}[open]")
            await fits(page)
            assert await faint(page) == []
            await page.keyboard.press("Escape")
        ground = await page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", ground))) < 200) == (scheme == "dark")


async def fits(page):
    wide = await page.evaluate(
        """() => [...document.querySelectorAll("body *")].filter(node => {
          const box = node.getBoundingClientRect();
          return node.checkVisibility() && box.width && !node.closest(".skip, .hidden, .scroll")
            && (box.right > innerWidth + 1 || box.left < -1);
        }).map(node => node.outerHTML.slice(0, 80))"""
    )
    assert wide == []
    assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    within = "(chat => chat.scrollWidth <= chat.clientWidth)(document.querySelector('main'))"
    assert await page.evaluate(within)  # a word that is too long is no box


async def faint(page):
    """Return the texts on the page with too little contrast to what is behind them."""
    return await page.evaluate(
        """() => {
          const light = ([r, g, b]) => [r, g, b].map(c => (c /= 255) <= .04045 ? c / 12.92
            : ((c + .055) / 1.055) ** 2.4).reduce((s, c, i) => s + c * [.2126, .7152, .0722][i], 0);
          const parse = colour => colour.match(/[\\d.]+/g).map(Number);
          const behind = node => {
            for (; node; node = node.parentElement) {
              const colour = parse(getComputedStyle(node).backgroundColor);
              if (colour.length < 4 || colour[3] === 1) return colour;
            }
            return [255, 255, 255];
          };
          return [...document.querySelectorAll("body *")].filter(node => node.checkVisibility()
            && !node.closest(".skip, .hidden")
            && [...node.childNodes].some(c => c.nodeType === 3 && c.textContent.trim())
          ).map(node => {
            const [a, b] = [parse(getComputedStyle(node).color), behind(node)].map(light);
            return [(Math.max(a, b) + .05) / (Math.min(a, b) + .05), node.textContent.slice(0, 30)];
          }).filter(([contrast]) => contrast < 4.5);
        }"""
    )


async def test_with_an_api_key(redis_url, worker, tmp_path, context):
    """The page itself needs no key, and says when the server does; with one, all of it works."""
    gateway = GatewayProcess(redis_url, tmp_path, env={"API_KEYS": "sesame"})
    try:
        page = await context.new_page()
        await page.goto(gateway.url)
        await until(page, "document.querySelector('#model').textContent === 'API key needed'")
        await page.click("#show-settings")
        await page.fill("[name=key]", "sesame")
        await page.keyboard.press("Enter")
        await page.wait_for_selector("#dot.ready")
        claimed, renewing = await begin(page, worker)
        await worker.say(claimed, "opened ")
        await until_said(page, "opened")
        await page.reload()
        await worker.say(claimed, "twice")
        await worker.finish(claimed)
        await until_over(page)
        renewing.cancel()
        assert await text_of(page) == "opened twice"
    finally:
        gateway.kill()


async def test_the_status_view_tells_how_busy_workers_are(gateway, worker, context):
    """Queue, sessions, and for each worker its slots, tokens a second and cache, as they change."""
    page = await context.new_page()
    await page.goto(gateway.url)
    await page.wait_for_selector("#dot.ready")
    await page.click("#show-status")
    for load, shown in (
        ({"running": 3, "slots": 8, "tokens_per_second": 87.4, "cache_usage": 0.125}, "87,12.5 %"),
        ({"running": 1, "slots": 8, "tokens_per_second": 2.46, "cache_usage": 0.0}, "2.5,0.0 %"),
    ):
        worker.load = load
        row = f"aaaaaa,ready,{load['running']} of 8,{shown},org/tiny"
        cells = "[...document.querySelectorAll('#workers td')].map(td => td.textContent).join()"
        await until(page, f"row => {cells} === row", arg=row)
        assert f"Running{load['running']}" in await text_of(page, "#facts")


JSON = {"content-type": "application/json"}
CONTROLLED = {**JSON, "x-unbroken-control": "sesame"}
REFUSED = (
    JSON,
    {**JSON, "x-unbroken-control": "1"},
    {**JSON, "x-unbroken-control": b"s\xe9same"},
    {**CONTROLLED, "host": "evil.example"},
    {**CONTROLLED, "origin": "http://evil.example"},
    {**CONTROLLED, "x-forwarded-for": "::1"},
    {**CONTROLLED, "via": "1.1 proxy"},
)


async def test_parts_are_killed_for_who_has_the_token_alone(redis_url, worker, tmp_path):
    """Nobody without what `run.py` printed, or from elsewhere; and nobody without `run.py`."""
    state = {"redis": {"pid": None}, "workers": [], "gateways": [], "control": "sesame"}
    (tmp_path / "run.json").write_text(json.dumps(state))
    plain = GatewayProcess(redis_url, tmp_path)
    watched = GatewayProcess(redis_url, tmp_path, {"RUN_STATE_PATH": str(tmp_path / "run.json")})
    try:
        async with httpx.AsyncClient() as client:

            async def kill(gateway, part="worker", headers=CONTROLLED):
                body = json.dumps({"part": part, "worker": worker.id})
                url = f"{gateway.url}/demo/kill"
                return (await client.post(url, content=body, headers=headers)).status_code

            for gateway, headers, offers in (
                (plain, CONTROLLED, False),
                (watched, JSON, False),
                (watched, CONTROLLED, True),
            ):
                told = await client.get(f"{gateway.url}/v1/status", headers=headers)
                assert told.json()["controls"] is offers
            assert await kill(plain) == 404
            for headers in REFUSED:
                assert await kill(watched, "gateway", headers) == 404, headers
            assert await kill(watched) == 400  # a worker that `run.py` did not start
            assert await kill(watched, "redis") == 400
            assert watched.process.poll() is None
            with pytest.raises(httpx.TransportError):
                await kill(watched, "gateway")
            assert watched.process.wait(5) == -9
    finally:
        plain.kill()
        watched.kill()
