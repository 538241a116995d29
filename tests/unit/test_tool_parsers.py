"""Parsers of tool calls: what they find, however the text comes, and whoever continues it."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from worker.engine.detokenizer import Detokenizer
from worker.tools import PARSERS, parser_for

CALL = '<tool_call>\n{"name": "look", "arguments": {"at": "the {sea}", "n": [1, {}]}}\n</tool_call>'
PIECES = [
    CALL,
    "<tool_call>",
    "</tool_call>",
    "\n",
    " ",
    '{"name": "a", "arguments": ',
    '{"arguments": {"x": "\\"}"}, "name": "b"}',
    '{"name": "now"}',
    '{"q": "\\\\"',
    "}",
    "]",
    '"',
    "{",
    "<",
    "<tool_",
    "call>",
    "é🙂",
    "words",
    "</think>",
]
texts = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=12).map("".join)


def found(name, parts):
    """Return what a parser finds in a text that comes in these parts, neighbours joined."""
    parser, text, out = PARSERS[name](), "", []
    for part, final in zip([*parts, ""], [False] * len(parts) + [True], strict=True):
        text += part
        for one in parser.read(text, final=final):
            shown, text = text[: one.size], text[one.size :]
            entry = [one.kind, "" if one.kind == "call" else shown, one.name, one.arguments]
            if out and one.kind in ("text", "arguments", "markup") and out[-1][0] == one.kind:
                out[-1][1] += shown
            else:
                out.append(entry)
    assert text == ""
    return out


def answer(name, text):
    """Return the content and the calls of a whole text."""
    content, calls = "", []
    for kind, shown, called, arguments in found(name, [text]):
        if kind == "call":
            calls.append((called, arguments))
        elif kind == "arguments":
            calls[-1] = (calls[-1][0], calls[-1][1] + shown)
        elif kind == "text":
            content += shown
    return content, calls


@pytest.mark.parametrize("name", PARSERS)
@given(text=texts, data=st.data())
@settings(max_examples=150, deadline=None)
@example(text=CALL, data=None)
def test_what_is_found_does_not_depend_on_the_pieces(name, text, data):
    """Split anywhere, a text has the same calls and the same content; nothing crashes."""
    whole = found(name, [text])
    assert found(name, list(text)) == whole
    cuts = range(len(text)) if data is None else [data.draw(st.integers(0, len(text)))]
    for cut in cuts:
        assert found(name, [text[:cut], text[cut:]]) == whole


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (CALL, "", [("look", '{"at": "the {sea}", "n": [1, {}]}')]),
        (f"I look. {CALL}\n\n{CALL}\n", "I look. ", [("look", None)] * 2),
        ('<tool_call>{"name": "now"}</tool_call>', "", [("now", "{}")]),
        (
            '<tool_call>{"arguments": {"a": "ü"}, "name": "x"}</tool_call>!',
            "!",
            [("x", '{"a": "ü"}')],
        ),
        ('<tool_call>{"name": "x", "arguments": {"a": 1', "", [("x", '{"a": 1')]),
        ('<tool_call>{"name": "x", "arg', '<tool_call>{"name": "x", "arg', []),
        ("<tool_call>words</tool_call>", "<tool_call>words</tool_call>", []),
        ('<tool_call>{"name": 5}</tool_call>', '<tool_call>{"name": 5}</tool_call>', []),
        ("a < b and <tool", "a < b and <tool", []),
        (
            '<tool_call>{"arguments": {"ü": "\\ud83d"}, "name": "x"}</tool_call>',
            "",
            [("x", '{"\\u00fc": "\\ud83d"}')],
        ),
        (
            '<tool_call>{"name": "a", "na\\u006de": "b", "arguments": {}}</tool_call>',
            '<tool_call>{"name": "a", "na\\u006de": "b", "arguments": {}}</tool_call>',
            [],
        ),
        (
            '<tool_call>{"name": "\\ud83d"}</tool_call>',
            '<tool_call>{"name": "\\ud83d"}</tool_call>',
            [],
        ),
        (
            '<tool_call>{"name": "\\ud83d", "arguments": {}}</tool_call>',
            '<tool_call>{"name": "\\ud83d", "arguments": {}}</tool_call>',
            [],
        ),
    ],
)
def test_a_call_is_found_and_what_is_none_stays_text(text, content, calls):
    """Name and arguments come out of the tags; wrong JSON is left as the model wrote it."""
    got_content, got = answer("qwen", text)
    assert got_content == content
    assert [name for name, _ in got] == [name for name, _ in calls]
    for (_, arguments), (_, wanted) in zip(got, calls, strict=True):
        assert wanted is None or arguments == wanted
    assert json.dumps([got_content, got], ensure_ascii=False).encode()  # can be sent


def test_a_parser_is_chosen_by_the_chat_template():
    """Tags around JSON are Qwen's; other templates have no parser, so tools are refused."""
    assert parser_for("… <tool_call>\n{{ call | tojson }} …") == "qwen"
    assert parser_for("… <tool_call><function=name> …") == parser_for("…") == ""


@pytest.fixture(scope="module")
def tokenizer(demo_model):
    from worker.engine.torchvision_shim import prepare_torchvision

    prepare_torchvision()
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo_model)


def said(tokenizer, ids, seam=0):
    """Return the appends of an output whose first `seam` tokens another worker has written."""
    detokenizer = Detokenizer(tokenizer, ("STOP",), thinking=True, parser=PARSERS["qwen"]())
    detokenizer.replay(ids[:seam])
    steps = [detokenizer.push(token) for token in ids[seam:]]
    return [pieces for pieces in [*steps, detokenizer.finish()] if pieces]


@given(text=texts, cuts=st.sets(st.integers(1, 200), max_size=30))
@settings(max_examples=60, deadline=None)
@example(text=f"STOP{CALL}", cuts=set())
@example(text=f"Let me look.{CALL}\n{CALL} words", cuts={3, 20, 40})
@example(text='<tool_call>{"name": "x", "arguments": {}} </tool_ <tool_call>', cuts={44, 50})
@example(text='a<tool_call>{"arguments": {"é": 1}, "name": "x"}</tool_call>\nb', cuts=set())
@example(text='<tool_call>\n{"name": "x"}\n</tool_call>', cuts={35})
@example(text='<tool_call>{"id": 1, "name": "x", "arguments": {}}</tool_call> b', cuts={53})
def test_a_successor_says_what_is_missing_from_any_seam(tokenizer, text, cuts):
    """From whichever append the log ends with, the rest has the same texts, calls and ids."""
    text = f"hm</think>\n\n{text}"
    places = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    parts = [text[a:b] for a, b in itertools.pairwise(places)]
    ids = [i for part in parts for i in tokenizer.encode(part, add_special_tokens=False)]
    whole = said(tokenizer, ids)
    for written in range(len(whole)):
        seam = sum(len(piece.ids) for pieces in whole[:written] for piece in pieces)
        assert said(tokenizer, ids, seam) == whole[written:]


def test_only_the_first_piece_of_a_call_bears_its_name(tokenizer):
    """Arguments come as the model writes them, behind one piece with the name."""
    ids = tokenizer.encode(f"hm</think>\n\n{CALL}\n{CALL}", add_special_tokens=False)
    pieces = [piece for pieces in said(tokenizer, ids) for piece in pieces if piece.call]
    for index in (0, 1):
        mine = [piece for piece in pieces if piece.call.index == index]
        assert [bool(piece.call.name) for piece in mine] == [True] + [False] * (len(mine) - 1)
        assert len(mine) > 3
        assert json.loads("".join(p.text for p in mine)) == {"at": "the {sea}", "n": [1, {}]}


@pytest.mark.parametrize(
    "call", [CALL, '<tool_call>{"arguments": {}, "name": "x"}</tool_call>'], ids=["usual", "turned"]
)
def test_an_output_ends_with_its_last_call(tokenizer, call):
    """Where only one call is allowed, what follows its end is dropped."""
    detokenizer = Detokenizer(tokenizer, parser=PARSERS["qwen"](), max_calls=1)
    pieces = []
    for token in tokenizer.encode(f"{call}\n{call}", add_special_tokens=False):
        if not detokenizer.stopped:
            pieces += detokenizer.push(token)
    pieces += detokenizer.finish()
    assert detokenizer.stopped
    assert {piece.call.index for piece in pieces if piece.call} == {0}
    assert not [piece for piece in pieces if piece.text and not piece.call]
