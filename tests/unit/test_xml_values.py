"""Where a value ends that is no plain string: between tags, whatever quotation marks it has."""

from __future__ import annotations

import json
import time
import timeit

import pytest

from tests.unit.test_tool_parsers import FUNCTIONS, XML, answer, parameter, tagged
from worker.tools import PARSERS
from worker.tools.arguments import Arguments


@pytest.mark.parametrize(
    "value",
    [
        '"Hi" she said, "well',
        '"well, he said',
        '[12" pipe',
        '"C:\\dir\\',
        '{"a": "b",, "c',
        '"a", "b',
        "[1] and [2",
        '["x</parameter>"y',
    ],
)
@pytest.mark.parametrize("break_", ["\n", ""])
def test_a_quotation_mark_without_a_second_one_stays_in_its_value(value, break_):
    """What is no JSON ends at its tag, so the parameters and the calls behind it are found."""
    inner = f"<parameter=maybe>{break_}{value}{break_}</parameter>\n{parameter('many', '5')}"
    content, got = answer("qwen-xml", tagged(inner) + "\n" + XML)
    assert content == ""
    value = value.partition("</parameter>")[0]
    assert [json.loads(arguments) for _, arguments in got] == [
        {"maybe": value, "many": 5},
        {"at": "the {sea}", "n": [1, {}]},
    ]


@pytest.mark.parametrize(
    ("schema", "word", "value"),
    [
        ({"type": "boolean"}, "True", True),
        ({"type": "boolean"}, "False\n", False),
        ({"type": ["integer", "null"]}, "None", None),
        ({"enum": [True, 5]}, "True", True),
        ({"type": ["boolean", "string"]}, "True", "True"),
        ({"type": "integer"}, "True", "True"),
        ({}, "None", "None"),
        ({"type": "boolean"}, "yes", "yes"),
    ],
)
def test_pythons_words_are_values_where_the_schema_has_their_type(schema, word, value):
    """A boolean or null that is written as in Python is one, unless it may be a string."""
    arguments = Arguments(json.dumps({"properties": {"a": schema}}))
    assert json.loads(arguments.json_of("a", f"\n{word}\n")) == value


@pytest.mark.parametrize("unit", ["</parameter>", '\\"', "<", '", "', "1"])
@pytest.mark.parametrize("step", [None, 8])
def test_the_work_for_a_value_grows_as_its_length_does(unit, step):
    """Eight times as long takes far less than the 64 times that looking at it again would."""

    def read(count):
        text = f'<tool_call>\n<function=look>\n<parameter=n>\n["{unit * count}'
        parser, at = PARSERS["qwen-xml"](FUNCTIONS), 0
        for size in range(step or len(text), len(text) + 1, step or 1):
            at += sum(one.size for one in parser.read(text[at:size], final=False))

    def seconds(count):  # of this thread, without garbage collection, undisturbed at least once
        return min(timeit.repeat(lambda: read(count), timer=time.thread_time, number=1, repeat=5))

    assert any(seconds(3200) < 24 * seconds(400) for _ in range(4))
