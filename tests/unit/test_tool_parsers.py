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
XML = (
    "<tool_call>\n<function=look>\n<parameter=at>\nthe {sea}\n</parameter>\n"
    "<parameter=n>\n[1, {}]\n</parameter>\n</function>\n</tool_call>"
)
LOOK = {
    "type": "object",
    "properties": {
        "at": {"type": "string"},
        "n": {"type": "array"},
        "many": {"type": "integer"},
        "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "day": {"$ref": "#/$defs/day"},
    },
    "$defs": {"day": {"type": "string", "format": "date"}},
}
FUNCTIONS = (("look", json.dumps(LOOK)), ("now", '{"type": "object"}'))
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
XML_PIECES = [
    XML,
    "<tool_call>\n<function=look>\n",
    "<tool_call>",
    "<function=now>",
    "<function=",
    "<parameter=at>",
    "<parameter=n>",
    "<parameter=other>\n",
    "\n</parameter>",
    "</parameter>",
    "</function>",
    "</tool_call>",
    "</",
    "<",
    "\n",
    " ",
    "[1, {}]",
    '"</parameter>"',
    "null",
    "5",
    "NaN",
    '"',
    "é🙂",
    "words",
    "</think>",
]
texts = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=12).map("".join)
xml_texts = st.lists(st.sampled_from(XML_PIECES) | st.text(max_size=4), max_size=12).map("".join)
any_texts = texts | xml_texts


def found(name, parts):
    """Return what a parser finds in a text that comes in these parts, neighbours joined."""
    parser, text, out = PARSERS[name](FUNCTIONS), "", []
    for part, final in zip([*parts, ""], [False] * len(parts) + [True], strict=True):
        text += part
        for one in parser.read(text, final=final):
            shown, text = text[: one.size], text[one.size :]
            shown = one.arguments or shown if one.kind == "arguments" else shown
            inner = "" if one.kind == "arguments" else one.arguments
            entry = [one.kind, "" if one.kind == "call" else shown, one.name, inner]
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
        elif kind in ("arguments", "end"):
            more = arguments if kind == "end" else shown
            calls[-1] = (calls[-1][0], calls[-1][1] + more)
        elif kind == "text":
            content += shown
    return content, calls


@pytest.mark.parametrize("name", PARSERS)
@given(text=any_texts, data=st.data())
@settings(max_examples=150, deadline=None)
@example(text=CALL, data=None)
@example(text=XML, data=None)
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


def tagged(inner, function="look"):
    return f"<tool_call>\n<function={function}>\n{inner}</function>\n</tool_call>"


def parameter(name, value):
    return f"<parameter={name}>\n{value}\n</parameter>\n"


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (XML, "", [("look", {"at": "the {sea}", "n": [1, {}]})]),
        (f"I look. {XML}\n\n{XML}!", "I look. !", [("look", None)] * 2),
        (tagged("", "now"), "", [("now", {})]),
        (tagged(parameter("x", '{"a": 1}'), "unknown"), "", [("unknown", {"x": {"a": 1}})]),
        (tagged(parameter("at", '5"\n\ttabs\n')), "", [("look", {"at": '5"\n\ttabs\n'})]),
        (tagged(parameter("at", "")), "", [("look", {"at": ""})]),
        (tagged("<parameter=at>in a line</parameter>"), "", [("look", {"at": "in a line"})]),
        (
            tagged(parameter("many", "5") + parameter("é", "é")),
            "",
            [("look", {"many": 5, "é": "é"})],
        ),
        (tagged(parameter("many", "five")), "", [("look", {"many": "five"})]),
        (tagged(parameter("maybe", "null")), "", [("look", {"maybe": None})]),
        (tagged(parameter("maybe", "12")), "", [("look", {"maybe": "12"})]),
        (tagged(parameter("maybe", '"a"')), "", [("look", {"maybe": "a"})]),
        (tagged(parameter("day", "2024")), "", [("look", {"day": "2024"})]),
        (tagged(parameter("n", '["</parameter>"]')), "", [("look", {"n": ["</parameter>"]})]),
        (
            tagged(parameter("n", '["</parameter>\\n</function>", {"a\\"": ["<b>"]}, 12]')),
            "",
            [("look", {"n": ["</parameter>\n</function>", {'a"': ["<b>"]}, 12]})],
        ),
        (tagged(parameter("n", "NaN")), "", [("look", {"n": "NaN"})]),
        (tagged(parameter("at", "a") + parameter("at", "b")), "", [("look", {"at": "a"})]),
        (tagged(f"{parameter('at', 'a')} words </odd>"), "", [("look", {"at": "a"})]),
        (
            f"<tool_call><function=look>{parameter('at', 'a')}</tool_call>",
            "",
            [("look", {"at": "a"})],
        ),
        ("<tool_call>\n<function=look>\n<param", "<tool_call>\n<function=look>\n<param", []),
        ("<tool_call>words</tool_call>", "<tool_call>words</tool_call>", []),
        (CALL, CALL, []),
    ],
)
def test_parameters_in_tags_become_json(text, content, calls):
    """Each is what its schema says, or JSON, or a string; what is no call is left as it is."""
    got_content, got = answer("qwen-xml", text)
    assert got_content == content
    assert [name for name, _ in got] == [name for name, _ in calls]
    for (_, arguments), (_, wanted) in zip(got, calls, strict=True):
        assert wanted is None or json.loads(arguments) == wanted


def test_a_string_is_shown_while_it_comes():
    """All but what may be its end: a call that is cut has the beginning of its arguments."""
    whole = XML[: XML.index("sea")]
    assert answer("qwen-xml", whole) == ("", [("look", '{"at": "the {')])


def test_a_parser_is_chosen_by_the_chat_template():
    """Tags around JSON or around parameters are Qwen's; others have no parser: no tools."""
    assert parser_for("… <tool_call>\n{{ call | tojson }} …") == "qwen"
    assert parser_for("… <tool_call>\n<function=name>\n<parameter=key> …") == "qwen-xml"
    assert parser_for("… <tool_call><function=name> …") == parser_for("…") == ""


@pytest.fixture(scope="module")
def tokenizer(demo_model):
    from worker.engine.torchvision_shim import prepare_torchvision

    prepare_torchvision()
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo_model)


def said(tokenizer, ids, seam=0, name="qwen"):
    """Return the appends of an output whose first `seam` tokens another worker has written."""
    parser = PARSERS[name](FUNCTIONS)
    detokenizer = Detokenizer(tokenizer, ("STOP",), thinking=True, parser=parser)
    detokenizer.replay(ids[:seam])
    steps = [detokenizer.push(token) for token in ids[seam:]]
    return [pieces for pieces in [*steps, detokenizer.finish()] if pieces]


@pytest.mark.parametrize("name", PARSERS)
@given(text=any_texts, cuts=st.sets(st.integers(1, 200), max_size=30))
@settings(max_examples=60, deadline=None)
@example(text=f"Let me look.{XML}\n{XML} words", cuts={3, 20, 40, 90, 100, 140})
@example(text=XML, cuts={64, 75, 83})
@example(text=XML.replace("</function>", "x <par <"), cuts={31, 57, 130})
@example(text=f"STOP{CALL}", cuts=set())
@example(text=f"Let me look.{CALL}\n{CALL} words", cuts={3, 20, 40})
@example(text='<tool_call>{"name": "x", "arguments": {}} </tool_ <tool_call>', cuts={44, 50})
@example(text='a<tool_call>{"arguments": {"é": 1}, "name": "x"}</tool_call>\nb', cuts=set())
@example(text='<tool_call>\n{"name": "x"}\n</tool_call>', cuts={35})
@example(text='<tool_call>{"id": 1, "name": "x", "arguments": {}}</tool_call> b', cuts={53})
def test_a_successor_says_what_is_missing_from_any_seam(tokenizer, name, text, cuts):
    """From whichever append the log ends with, the rest has the same texts, calls and ids."""
    text = f"hm</think>\n\n{text}"
    places = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    parts = [text[a:b] for a, b in itertools.pairwise(places)]
    ids = [i for part in parts for i in tokenizer.encode(part, add_special_tokens=False)]
    whole = said(tokenizer, ids, name=name)
    for written in range(len(whole)):
        seam = sum(len(piece.ids) for pieces in whole[:written] for piece in pieces)
        assert said(tokenizer, ids, seam, name) == whole[written:]


class Chunks:
    """A tokenizer whose tokens are these texts, in order."""

    all_special_ids = ()

    def __init__(self, texts):
        self.texts = texts

    def __len__(self):
        return len(self.texts)

    def decode(self, ids, **_):
        return "".join(self.texts[token] for token in ids)


@pytest.mark.parametrize("name", PARSERS)
@given(text=any_texts, cuts=st.sets(st.integers(1, 200), max_size=30))
@settings(max_examples=150, deadline=None)
@example(text=f"{XML}\n{XML} words", cuts={45, 50, 61, 69, 78, 84, 90})
@example(text=XML.replace("sea}", "x"), cuts={60, 65, 75})
@example(text='<tool_call>{"name": "x", "arguments": {}}</tool_call>', cuts={50, 58})
def test_a_token_may_be_any_piece_of_a_call(name, text, cuts):
    """Wherever tags and values lie in the tokens, a successor goes on from each append."""
    text = f"hm</think>\n\n{text}"
    places = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    chunks = Chunks([text[a:b] for a, b in itertools.pairwise(places)])
    ids = list(range(len(chunks)))
    whole = said(chunks, ids, name=name)
    for written in range(len(whole)):
        seam = sum(len(piece.ids) for pieces in whole[:written] for piece in pieces)
        assert said(chunks, ids, seam, name) == whole[written:]


@pytest.mark.parametrize(("name", "call"), [("qwen", CALL), ("qwen-xml", XML)])
def test_only_the_first_piece_of_a_call_bears_its_name(tokenizer, name, call):
    """Arguments come as the model writes them, behind one piece with the name."""
    ids = tokenizer.encode(f"hm</think>\n\n{call}\n{call}", add_special_tokens=False)
    pieces = [piece for pieces in said(tokenizer, ids, 0, name) for piece in pieces if piece.call]
    for index in (0, 1):
        mine = [piece for piece in pieces if piece.call.index == index]
        assert [bool(piece.call.name) for piece in mine] == [True] + [False] * (len(mine) - 1)
        assert len(mine) > 3
        assert json.loads("".join(p.text for p in mine)) == {"at": "the {sea}", "n": [1, {}]}


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("qwen", CALL),
        ("qwen", '<tool_call>{"arguments": {}, "name": "x"}</tool_call>'),
        ("qwen-xml", XML),
        ("qwen-xml", XML.replace("\n</function>", "")),
        ("qwen-xml", "<tool_call>\n<function=now>\n</function>\n</tool_call>"),
    ],
    ids=["usual", "turned", "xml", "xml without an end", "xml without a parameter"],
)
def test_an_output_ends_with_its_last_call(tokenizer, name, call):
    """Where only one call is allowed, what follows its end is dropped."""
    detokenizer = Detokenizer(tokenizer, parser=PARSERS[name](FUNCTIONS), max_calls=1)
    pieces = []
    for token in tokenizer.encode(f"{call}\n{call}", add_special_tokens=False):
        if not detokenizer.stopped:
            pieces += detokenizer.push(token)
    pieces += detokenizer.finish()
    assert detokenizer.stopped
    assert {piece.call.index for piece in pieces if piece.call} == {0}
    assert json.loads("".join(piece.text for piece in pieces if piece.call)) is not None
    assert not [piece for piece in pieces if piece.text and not piece.call]
