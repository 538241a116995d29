"""Markdown in the page's answers: shown as such, harmless, and the same however it streams in."""

import functools
import http.server
import random
import re
import threading

import pytest

from tests.page_kit import CHROMIUM, browser_context
from tests.stack import ROOT

pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH"),
]

LINK = '<a href="{0}" title="{0}" target="_blank" rel="noopener noreferrer nofollow">{1}</a>'
CASES = {
    "plain, 1, 2, 3 ": "<p>plain, 1, 2, 3 </p>",
    "one\ntwo\n\nthree": "<p>one\ntwo</p><p>three</p>",
    "**bold** *it* _so_ ~~no~~ `a*b*`": (
        "<p><strong>bold</strong> <em>it</em> <em>so</em> <del>no</del> <code>a*b*</code></p>"
    ),
    "***both***": "<p><strong><em>both</em></strong></p>",
    "snake_case_name 2*3*4 * x": "<p>snake_case_name 2<em>3</em>4 * x</p>",
    "open **bold and `code": "<p>open **bold and `code</p>",
    r"\*no\* `` a`b ``": "<p>*no* <code>a`b</code></p>",
    "# Top\n### Third ###": "<h3>Top</h3><h5>Third</h5>",
    "- a\n- b\n  1. c\n  2. d\n\n  e\n- f": (
        "<ul><li>a</li><li>b<ol><li>c</li><li>d</li></ol><p>e</p></li><li>f</li></ul>"
    ),
    "7. x\n8. y": '<ol start="7"><li>x</li><li>y</li></ol>',
    "In\n1968. was": "<p>In\n1968. was</p>",
    "> q\n> > r\n\nafter": (
        "<blockquote><p>q</p><blockquote><p>r</p></blockquote></blockquote><p>after</p>"
    ),
    "a\n\n---\nb": "<p>a</p><hr><p>b</p>",
    "see https://a.example/x_(y)_z, and [this *one*](http://b.example).": (
        "<p>see " + LINK.format("https://a.example/x_(y)_z", "https://a.example/x_(y)_z") + ", and "
        + LINK.format("http://b.example", "this <em>one</em>") + ".</p>"
    ),
}  # fmt: skip
HOSTILE = (
    "<img src=x onerror=alert(1)>",
    "<script>alert(1)</script>",
    "[x](javascript:alert(1))",
    "[x](data:text/html,<script>alert(1)</script>)",
    "![x](https://evil.example/p.png)",
    '[x](https://a.example/"onmouseover="alert(1))',
    "`<b>`\n\n```html\n<iframe src=//evil.example></iframe>\n```",
    "| <svg onload=alert(1)> | b |\n|---|---|\n| <i>c</i> | d |",
    "> <details open ontoggle=alert(1)>",
)
ALLOWED = {
    *("P", "H3", "H4", "H5", "H6", "UL", "OL", "LI", "BLOCKQUOTE", "HR", "PRE", "CODE", "A"),
    *("STRONG", "EM", "DEL", "TABLE", "THEAD", "TBODY", "TR", "TH", "TD", "DIV", "SPAN", "BUTTON"),
}
LONG = """\
# Title

Some *text* with `code`
and **more**.
- one
- two

  more of two
   - deeper
- three
1. first
2. second

```python
def f():
    return "```" * 2

# no heading
```
> quoted
lazily

| a | b |
|---|:-:|
| 1 | `x|y` |
| 2 | z \\| w |

---
last [link](https://a.example/b) line
---x
""" + "\n\n".join(HOSTILE)


class Files(http.server.SimpleHTTPRequestHandler):
    """The page's files alone, without the gateway's policy, which would stop scripts by itself."""

    def log_message(self, *_args):
        """Say nothing."""


@pytest.fixture
async def page():
    handler = functools.partial(Files, directory=ROOT / "gateway")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        async with browser_context() as context:
            page = await context.new_page()
            await page.goto(f"http://127.0.0.1:{server.server_port}/static/")
            yield page
        server.shutdown()


async def shown(page, *texts):
    """Return the HTML of a Markdown element that was given these texts, one after the other."""
    return await page.evaluate(
        """async texts => {
          const { Markdown } = await import("/static/markdown.js");
          const root = document.createElement("div");
          const markdown = new Markdown(root);
          for (const text of texts) markdown.set(text);
          return root.innerHTML;
        }""",
        list(texts),
    )


async def test_what_is_understood(page):
    """Paragraphs, emphasis, code, headings, lists, quotes, rules and links become elements."""
    assert {text: await shown(page, text) for text in CASES} == CASES
    html = await shown(page, "```sh\n$ ls <x>\n  y\n```\nthen")
    assert "<pre tabindex" in html
    assert "<code>$ ls &lt;x&gt;\n  y</code></pre></div><p>then</p>" in html
    html = await shown(page, "| a | b |\n|--|--|\n| 1 | `2` |\n| 3 |")
    cells = re.findall(r"<t[hd]>(.*?)</t[hd]>", html)
    assert cells == ["a", "b", "1", "<code>2</code>", "3", ""]


async def test_an_answer_brings_no_html(page):
    """Tags are text, links lead to http, https and mailto alone, pictures are not fetched."""
    await page.evaluate("() => { window.alert = () => { window.ran = true; }; }")
    for text in HOSTILE:
        found = await page.evaluate(
            """async text => {
              const { Markdown } = await import("/static/markdown.js");
              const root = document.body;
              root.replaceChildren();
              new Markdown(root).set(text);
              return [...root.querySelectorAll("*")].map(node => [node.tagName, node.href ?? "",
                node.getAttributeNames().filter(name => name.startsWith("on"))]);
            }""",
            text,
        )
        assert {tag for tag, _, _ in found} <= ALLOWED
        assert all(re.match(r"https?://|$", href) for _, href, _ in found), found
        assert not any(handlers for _, _, handlers in found), found
    assert not await page.evaluate("window.ran")


async def test_streaming_changes_nothing(page):
    """However a text is cut into deltas, the end is what the whole text gives at once."""
    whole = await shown(page, LONG)
    assert whole.count("<li>") == 6
    assert await shown(page, *(LONG[:end] for end in range(len(LONG) + 1))) == whole
    draw = random.Random(3)
    for _ in range(20):
        cuts = sorted(draw.sample(range(len(LONG)), 12))
        assert await shown(page, *(LONG[:cut] for cut in cuts), LONG) == whole
    assert await shown(page, LONG, "another") == "<p>another</p>"


async def test_what_is_settled_is_left_alone(page):
    """A long answer is not made again for each delta: only its last block is."""
    same = await page.evaluate(
        """async text => {
          const { Markdown } = await import("/static/markdown.js");
          const root = document.createElement("div");
          const markdown = new Markdown(root);
          markdown.set(text);
          const before = [...root.childNodes];
          markdown.set(text + " and more\\nof it");
          return before.map((node, place) => node === root.childNodes[place]);
        }""",
        "# a\n\nb\n\n- c\n\nd\ne",
    )
    assert same == [True, True, True, False]


async def test_no_text_takes_long(page):
    """Texts made to be slow are shown within a second each."""
    for text in ("*a _b " * 4000, "[" * 20000, "`" * 19999 + " a", "> " * 5000, "`a ``b " * 3000,
                 "- " * 5000, "**a" * 6000, "|" * 20000 + "\n|-|"):  # fmt: skip
        seconds = await page.evaluate(
            """async text => {
              const { Markdown } = await import("/static/markdown.js");
              const start = performance.now();
              new Markdown(document.createElement("div")).set(text);
              return (performance.now() - start) / 1000;
            }""",
            text,
        )
        assert seconds < 1, text[:10]


GROWING = {
    "backticks": lambda n: "` " + "x" * 4 * n,
    "openers": lambda n: "**a " * n,
    "heading": lambda n: "# " + " " * n + "x" + " " * n + "\r\u2028x",
    "blanks": lambda n: "- a" + "\n" * 4 * n + "  b",
    "fence": lambda n: "~" * 8 * n + "`",
    "rule": lambda n: "a|b\n-" + " " * 8 * n + "x",
    "table": lambda n: "a|" * n + "\n" + "-|" * n + "\n" + "|\n" * n,
}


@pytest.mark.parametrize("kind", GROWING)
async def test_time_grows_with_the_text(page, kind):
    """Four times the text takes about four times as long, not sixteen times."""
    small, large = await page.evaluate(
        """async texts => {
          const { Markdown } = await import("/static/markdown.js");
          const took = text => {
            const start = performance.now();
            new Markdown(document.createElement("div")).set(text);
            return performance.now() - start;
          };
          return texts.map(text => Math.min(...Array.from({ length: 5 }, () => took(text))));
        }""",
        [GROWING[kind](1000), GROWING[kind](4000)],
    )
    assert large < 9 * max(small, 10), (small, large)  # ms; less than 10 is noise
