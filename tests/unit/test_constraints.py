"""Answers that follow a grammar, thoughts with a budget: a real engine over random weights."""

from __future__ import annotations

import json
import random
import time

import jsonschema
import pytest

from gateway.json_schema import MAX_WIDTH, OPTIONS
from shared.errors import UnbrokenError
from tests.engine_kit import Driver, Engine
from tests.grammar_kit import ONE, calls, content, form, prompt, run, sampling
from tests.random_schemas import a_schema
from worker.child import ChildDied, ChildTimeout
from worker.engine.engine import GRAMMAR_FAILED, LOG_FAILED
from worker.engine.messages import AnswerForm
from worker.forms import FormChecker

pytestmark = pytest.mark.timeout(120)  # two hundred answers, where others compute too


@pytest.fixture(scope="module")
def engine(loaded):
    return Engine(loaded, 32)


def test_two_hundred_random_schemas_are_followed(engine):
    """Each answer validates, with 32 schemas in a batch, greedy and sampled, thought or not."""
    draw = random.Random(5)
    works, schemas = [], []
    for seed in range(200):
        schemas.append(a_schema(draw))
        changes = {"thinking_budget": 6, "temperature": draw.choice([0.0, 0.7, 1.5]), "seed": seed}
        thinking = bool(seed % 2)
        works.append((prompt(form(schemas[-1]), seed, thinking=thinking), sampling(**changes)))
    driver = run(engine, *works)
    for handle, schema in enumerate(schemas, 1):
        assert driver.last(handle).finish == "stop", schema
        jsonschema.validate(json.loads(content(driver, handle)), schema)


def test_a_row_says_the_same_alone_and_in_a_batch(engine, loaded):
    """Other rows with other schemas, or with none, change nothing."""
    works = [
        (prompt(form(), 1, thinking=True), sampling(thinking_budget=5, max_tokens=60)),
        (prompt(calls(), 2), sampling(temperature=0, max_tokens=60)),
        (prompt(None, 3), sampling(max_tokens=30)),
        (prompt(form({"type": "array", "items": ONE}), 4), sampling(max_tokens=60)),
    ]
    together = run(engine, *works)
    for handle, work in enumerate(works, 1):
        assert run(Engine(loaded, 1), work).ids(1) == together.ids(handle)


def test_a_sequence_continues_from_any_seam(engine):
    """Whatever part of it a successor knows, its tokens and its text go on as they would have."""
    for work in (
        (prompt(form(), 7, thinking=True), sampling(thinking_budget=5, max_tokens=70)),
        (prompt(calls(), 8, thinking=True), sampling(thinking_budget=3, max_tokens=70)),
    ):
        whole = run(engine, work)
        ids = whole.ids(1)
        seams, count = [], 0
        for output in whole.said[1]:
            count += sum(len(piece.ids) for piece in output.pieces)
            seams.append(count)
        seams = [*seams[:8], *seams[8::5]]  # within the thought, its end, and behind
        again = run(engine, *[(*work, ids[:seam]) for seam in seams])
        for handle, seam in enumerate(seams, 1):
            assert again.ids(handle) == ids[seam:], seam
            assert whole.text(1).endswith(again.text(handle))
            assert again.last(handle).finish == whole.last(1).finish
            assert again.last(handle).reasoning_tokens == whole.last(1).reasoning_tokens


@pytest.mark.parametrize("parallel", [True, False])
def test_a_required_call_is_one_of_the_functions(engine, parallel):
    """Names are of the request, arguments follow their schema, and the reason is `tool_calls`."""
    called = calls(parallel=parallel)
    work = [
        (prompt(called, s, thinking=True), sampling(seed=s, thinking_budget=2, max_tokens=150))
        for s in range(6)
    ]
    driver = run(engine, *work)
    most = 0
    for handle in range(1, 7):
        last = driver.last(handle)
        made: dict[int, list[str]] = {}
        for piece in (p for o in driver.said[handle] for p in o.pieces):
            if piece.call:
                made.setdefault(piece.call.index, [piece.call.name, ""])[1] += piece.text
        most = max(most, len(made))
        assert last.finish == "length" or content(driver, handle) == ""
        assert last.finish == ("tool_calls" if last.completion_tokens < 150 else "length")
        for name, arguments in list(made.values())[: None if last.finish == "tool_calls" else -1]:
            assert name in ("look", "now")
            jsonschema.validate(json.loads(arguments), ONE)
    assert most == 1 or parallel


def test_a_named_function_is_the_only_one(engine):
    """Of one function, the call is that one."""
    driver = run(engine, (prompt(calls(["now"], parallel=False)), sampling()))
    assert next(p.call.name for o in driver.said[1] for p in o.pieces if p.call) == "now"


def test_an_object_as_wide_as_it_may_be_is_followed(engine):
    """Each of the properties that may be left out may come next, and the matcher bears it."""
    wide = {f"p{number}": {} for number in range(MAX_WIDTH - 1)}
    driver = run(
        engine,
        *[
            (prompt(form({"type": "object", "properties": wide} | more), 7), sampling(max_tokens=9))
            for more in ({}, {"additionalProperties": False})
        ],
    )
    assert [driver.last(handle).error for handle in (1, 2)] == [None, None]
    assert content(driver, 1).startswith("{")


def test_a_cut_answer_is_the_beginning_of_one(engine):
    """`max_tokens` ends it as `length`; nothing is added to close it."""
    whole = run(engine, (prompt(form(), 7), sampling()))
    cut = run(engine, (prompt(form(), 7), sampling(max_tokens=6)))
    assert cut.last(1).finish == "length"
    assert cut.ids(1) == whole.ids(1)[:6]


@pytest.mark.parametrize("fields", [{"min_tokens": 240}, {"ignore_eos": True}, {"top_k": 1}])
def test_an_answer_that_is_complete_ends(engine, fields):
    """Nothing can follow it, whatever else is asked for."""
    driver = run(engine, (prompt(form(), 7), sampling(**fields)))
    assert driver.last(1).finish == "stop"
    jsonschema.validate(json.loads(content(driver, 1)), ONE)


def test_an_answer_does_not_end_in_its_thought(engine, loaded):
    """EOS, wanted with all its might, comes neither in the thought nor within the answer."""
    wanted = dict.fromkeys(loaded.eos_ids, 100.0)
    work = (prompt(form(), thinking=True), sampling(logit_bias=wanted, thinking_budget=9))
    driver = run(engine, work, (prompt(None, thinking=True), sampling(logit_bias=wanted)))
    assert driver.last(2).completion_tokens == 1
    jsonschema.validate(json.loads(content(driver, 1)), ONE)
    assert driver.last(1).reasoning_tokens == 10


@pytest.mark.parametrize("budget", [0, 1, 7])
def test_a_thought_ends_with_its_budget(engine, loaded, budget):
    """After so many tokens comes the end of the thought, and it counts as reasoning."""
    work = (prompt(None, thinking=True), sampling(thinking_budget=budget, max_tokens=30, top_k=40))
    free = run(engine, (work[0], sampling(max_tokens=30, top_k=40)))
    driver = run(engine, work)
    [close] = loaded.tokenizer.encode("</think>", add_special_tokens=False)
    assert free.ids(1).index(close) > 7 if close in free.ids(1) else True
    assert driver.ids(1)[: budget + 1] == [*free.ids(1)[:budget], close]
    assert driver.last(1).reasoning_tokens == budget + 1
    assert driver.last(1).completion_tokens == len(driver.ids(1))


def test_a_grammar_that_gives_up_fails_its_sequence(engine):
    """Neither in the middle nor in what a successor reads does it count as the answer's end."""
    wrong = run(engine, (prompt(form(), 7), sampling())).ids(1)[3:] * 2
    again = run(engine, (prompt(form(), 7), sampling(), wrong), (prompt(form(), 8), sampling()))
    assert again.last(1).error == ("generation_failed", LOG_FAILED)
    assert again.last(2).finish == "stop"
    driver = Driver(engine)
    driver.add(1, prompt(form(), 7), sampling())
    for _ in range(4):
        driver.step()
    engine.scheduler.find(1).constraint.matcher.consume_tokens(wrong)
    driver.drain()
    assert driver.last(1).finish is None
    assert driver.last(1).error == ("generation_failed", GRAMMAR_FAILED)


def hang():
    return {"allOf": [{"type": "string", "pattern": f".*[a-m].{{{i}}}x.*"} for i in range(30)]}


class ScriptedPool:
    """Ends each call as it is told."""

    def __init__(self, *ends):
        self.ends = list(ends)

    async def call(self, _form):
        if end := self.ends.pop(0):
            raise end


async def test_a_child_that_ends_is_no_verdict_on_a_form():
    """One more try follows; after two, the form is refused, but the next request tries again."""
    checker = FormChecker(1)
    checker._pool = pool = ScriptedPool(ChildDied(), ChildTimeout(), ChildTimeout(), None)
    with pytest.raises(UnbrokenError, match="too complex"):
        await checker.check(form())
    await checker.check(form())
    await checker.check(form())  # remembered
    assert pool.ends == []


async def test_bad_schemas_are_refused_in_bounded_time():
    """What the compiler cannot do is a 400 that names the field; one that hangs it, too."""
    checker = FormChecker(1, seconds=3)
    await checker.start()
    try:
        await checker.check(form())
        for schema in (
            {"not": {}},
            {"type": "strange"},
            {"enum": []},
            {"type": "integer", "minimum": 5, "maximum": 3},
            {"type": "string", "pattern": "((("},
            {"$ref": "#/nowhere"},
            {"oneOf": [{"type": "string"}, {"enum": ["a"]}]},
            {"properties": {"a": {}}, "required": ["b"], "additionalProperties": False}
            | {"type": "object"},
            hang(),
        ):
            for _again in range(2):  # the compiler's verdict is remembered
                began = time.monotonic()
                with pytest.raises(UnbrokenError) as caught:
                    await checker.check(form(schema))
                assert (caught.value.kind.status, caught.value.param) == (400, "response_format")
                assert time.monotonic() - began < 50  # two attempts, and a child that starts anew
        wrong = {"tools": "qwen", "functions": (("f", '{"type": "strange"}'),)}
        for demanded in ({"required": True}, {"strict": ("f",)}):
            with pytest.raises(UnbrokenError) as caught:
                await checker.check(AnswerForm(**wrong, **demanded))
            assert caught.value.param == "tools"
        await checker.check(AnswerForm(**wrong))  # nothing to follow
        await checker.check(calls())  # the child that was killed has a successor
    finally:
        await checker.close()


@pytest.mark.parametrize("kind", ["format", "required", "strict"])
async def test_what_the_matcher_gives_up_on_behind_its_opening_is_refused(kind):
    """Too much to come next is found on trial, also where the schema is behind a call's name."""
    checker = FormChecker(1, seconds=15)
    await checker.start()
    try:
        for parts, borne in ((1, True), (9, False)):
            wide = [
                {"type": "object", "properties": {f"p{part}_{n}": {} for n in range(300)}}
                for part in range(parts)
            ]
            # the gateway refuses the wider one: this is for what it takes for less wide than it is
            checked = json.dumps({"anyOf": wide, "x-guidance": OPTIONS})
            functions = tuple((name, checked) for name in ("now", "see-it.v1"))
            bound = {"required": {"required": True}, "strict": {"strict": ("see-it.v1",)}}
            tools = {"tools": "qwen", "functions": functions}
            asked = AnswerForm(checked) if kind == "format" else AnswerForm(**tools, **bound[kind])
            if borne:
                await checker.check(asked)
                continue
            with pytest.raises(UnbrokenError, match=r"cannot be followed: .*items") as caught:
                await checker.check(asked)
            assert caught.value.param == ("response_format" if kind == "format" else "tools")
    finally:
        await checker.close()
