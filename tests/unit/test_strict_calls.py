"""Calls of strict functions that a model may make or not: their arguments follow the schema."""

from __future__ import annotations

import json

import jsonschema
import pytest
from llguidance import LLMatcher, LLTokenizer

from tests.engine_kit import Engine
from tests.grammar_kit import ONE, called, offered, prompt, run, sampling
from worker import grammar
from worker.engine.constraint import Tokens
from worker.engine.outfit import outfit
from worker.engine.sequence import Sequence

pytestmark = pytest.mark.timeout(120)

LOOK = '<tool_call>\n{"name": "look", "arguments": {"at": "x", "n": '
NOW = LOOK.replace("look", "now")
NEEDLESS = "<tool_call> what"  # a call of nothing


@pytest.fixture(scope="module")
def engine(loaded):
    return Engine(loaded, 16)


@pytest.fixture(scope="module")
def ids(loaded):
    return lambda text: tuple(loaded.tokenizer.encode(text, add_special_tokens=False))


def texts(loaded, driver, handle):
    return loaded.tokenizer.decode(driver.ids(handle))


@pytest.mark.parametrize(
    ("text", "accepted"),
    [
        ('\n{"name": "look", "arguments": {"at": "x", "n": 1}}\n</tool_call>', True),
        ('{"name":"look","parameters":{"at":"","n":null}}</tool_call>', True),
        ('\n{"name": "look", "arguments": {"at": "x"}}\n</tool_call>', False),
        ('\n{"name": "look", "arguments": {"at": "x", "n": 1, "m": 1}}\n</tool_call>', False),
        ('\n{"name": "look", "arguments": {"at": "much too long", "n": 1}}', False),
        ('\n{"name": "look", "n": 1}\n</tool_call>', False),
        ('\n{"arguments": {"at": "x", "n": 1}, "name": "look"}\n</tool_call>', False),
        ('\n{"name": "looks", "arguments": {}}\n</tool_call>', False),
        ('\n{"name": "now"', True),
        ('\n{"name": "now", "arguments": wrong', True),
        ('\n{"name": "no', False),
        ('\n{"name": "look.far", "arguments": {"x": 1}}', True),
        ('\n{"name": "lookxfar", "arguments": {"x": 1}}', False),
        ("what", False),
    ],
)
def test_the_grammar_of_a_call_begins_behind_its_tag(text, accepted):
    """Names are those of the request; strict ones bring their schema, the others may go on."""
    tokenizer = LLTokenizer("byte")
    text_of = grammar.build(offered(free=("now", "look.far")))
    matcher = LLMatcher(tokenizer, text_of, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    read = matcher.consume_tokens(tokenizer.tokenize_str(text))
    assert (read and matcher.is_accepting()) is accepted


@pytest.mark.parametrize("budget", [None, 4])
def test_strict_calls_follow_their_schema(engine, ids, budget):
    """However many there are, of whichever function, behind a thought or not."""
    [tag], form = ids("<tool_call>"), offered(("look", "see"))
    works = [
        (
            prompt(form, seed, thinking=budget is not None),
            sampling(seed=seed, logit_bias={tag: 14.0}, thinking_budget=budget, temperature=2.5),
        )
        for seed in range(8)
    ]
    driver = run(engine, *works)
    made = []
    for handle in range(1, 9):
        cut = driver.last(handle).finish == "length"
        mine = called(driver, handle)
        made += mine[:-1] if cut else mine
    assert {"look", "see"} <= {name for name, _ in made}
    for name, arguments in made:
        if name != "now":
            jsonschema.validate(json.loads(arguments), ONE)
    assert len(made) > 8  # some have more than one


def test_a_strict_call_is_bound_and_a_free_one_is_not(engine, loaded, ids):
    """What follows `"n": ` is one of its three values; in a free call it is what it would be."""
    free = sampling(max_tokens=12, temperature=0)
    works = [
        (prompt(form, 7), free, ids(text))
        for form, text in (
            (offered(), LOOK),
            (offered((), ("look", "now")), LOOK),
            (offered(), NOW),
            (offered((), ("look", "now")), NOW),
            (offered(), f"{NOW}1}}}}\n</tool_call>\n{LOOK}"),
            (offered(), f'<tool_call>\n{{"name": "now", "q{LOOK}'),
            (offered(), f"{NEEDLESS}</tool_call> {LOOK}"),
        )
    ]
    driver = run(
        engine, *[(p, sampling(max_tokens=len(i) + 12, temperature=0), i) for p, _, i in works]
    )
    said = {handle: texts(loaded, driver, handle) for handle in range(1, 8)}
    for handle in (1, 5, 6, 7):
        value, _, rest = said[handle].partition("}")
        assert json.loads(value) in (1, 2.5, None), said
        assert rest.lstrip(" \n").startswith("}"), said
    assert not said[2].startswith(("1}", "2.5}", "null}"))
    assert said[3] == said[4] != said[1]


def test_text_without_a_call_is_untouched(engine):
    """Token by token an answer that calls nothing is what it is without strict functions."""
    works = [(prompt(form, 3), sampling(max_tokens=80)) for form in (offered(), offered(()))]
    driver = run(engine, *works)
    assert called(driver, 1) == []
    assert driver.ids(1) == driver.ids(2)


def test_no_token_goes_on_behind_the_tag(engine, loaded, ids):
    """Where the tag is spelled in letters, its last one comes alone, so that nothing escapes."""
    [line], [end] = ids(">\n"), ids(">")
    sequence = Sequence(1, prompt(offered()), sampling(), loaded.eos_ids, 400)
    outfit(sequence, loaded.tokenizer, engine.tokens)
    constraint = sequence.constraint
    if constraint.compiling:
        constraint.compiling.future.result(60)
    constraint.adopt()
    assert constraint.barred == []
    for token in (*ids("a <tool_call"), end):
        assert not constraint.has_mask
        sequence.detokenizer.push(token)
        constraint.push(token)
        spelled = sequence.detokenizer.unread == "<tool_call"
        assert (line in constraint.barred, end in constraint.barred) == (spelled, False)
    assert constraint.has_mask


class Vocabulary:
    """A tokenizer of three tokens."""

    words = (b">x", b"a <tool_call> b", b"call>")
    vocab_size = len(words)

    def decode_bytes(self, ids):
        return b"".join(self.words[i] for i in ids)


def test_tokens_past_the_tag_are_known_before_there_are_requests(loaded, engine, monkeypatch):
    """The vocabulary is read once, at the start; a token around a whole tag never may come."""
    tokens = Tokens(loaded, engine.runner.vocab_size)
    monkeypatch.setattr(tokens, "_tokenizer", None)  # nothing can be read any more
    assert tokens.past("<tool_call>", 10)
    monkeypatch.setattr(tokens, "_tokenizer", Vocabulary())
    found = tokens._tokens_past("<tool_call>")
    assert found[0] == found[6] == [1]
    assert found[10] == [0, 1]


def test_a_successor_goes_on_from_any_seam(engine, ids):
    """In the text, in a call and between two, its tokens are those of an undisturbed run."""
    [tag] = ids("<tool_call>")
    work = prompt(offered(("look",), ()), 5), sampling(logit_bias={tag: 12.0}, max_tokens=150)
    whole = run(engine, work)
    assert len(called(whole, 1)) > 1
    seams, count = [], 0
    for output in whole.said[1]:
        count += sum(len(piece.ids) for piece in output.pieces)
        seams.append(count)
    again = run(engine, *[(*work, whole.ids(1)[:seam]) for seam in seams[::4]])
    for handle, seam in enumerate(seams[::4], 1):
        assert again.ids(handle) == whole.ids(1)[seam:], seam


def test_a_log_that_breaks_the_schema_goes_on_freely(engine, ids):
    """A worker that knew no strict functions may have begun it: that is no failure."""
    known = ids('<tool_call>\n{"name": "look", "arguments": {"where": ')
    driver = run(engine, (prompt(offered()), sampling(max_tokens=len(known) + 9), known))
    assert driver.last(1).error is None
    assert driver.last(1).completion_tokens == len(known) + 9
