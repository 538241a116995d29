"""What a request leaves to the model, and what is refused before it waits."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.admission import ReadyModels
from gateway.fit import check_fits, with_defaults
from gateway.limits import cost
from gateway.openai import parse_chat
from gateway.responses_parse import parse_response
from gateway.submission import _suited
from shared.errors import UnbrokenError
from shared.fleet import WorkerInfo
from shared.settings import GatewaySettings
from tests.stack import ROOT
from worker.demo_model import ensure_demo_model
from worker.engine.torchvision_shim import prepare_torchvision

prepare_torchvision()  # before anything imports transformers
# ruff: noqa: E402

from transformers import AutoTokenizer, GenerationConfig

from worker.engine.defaults import longest_token, sampling_defaults

SETTINGS = GatewaySettings(_env_file=None)
AUTHORS = {"top_k": 20.0, "top_p": 0.95, "repetition_penalty": 1.05}


def chat(text="x", **fields):
    return parse_chat({"messages": [{"role": "user", "content": text}], **fields}, SETTINGS)


def worker(**fields):
    known = {"context_length": 128, "token_bytes": 10, **fields}
    return WorkerInfo("w", "ready", "m", **known)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ensure_demo_model(ROOT / "models" / "demo-fast"))


def test_the_models_authors_decide_what_nobody_else_does():
    """The request comes first, then the environment (temperature), then `generation_config`."""
    asked = chat(top_p=0.5)
    used = with_defaults(asked, worker(defaults={**AUTHORS, "temperature": 1.9})).generation
    assert (used.sampling.top_p, used.sampling.top_k) == (0.5, 20)
    assert used.sampling.repetition_penalty == 1.05
    assert used.sampling.temperature == SETTINGS.temperature
    assert isinstance(used.sampling.top_k, int)


def test_defaults_change_no_digest():
    """A body means the same request whichever model's defaults were filled in."""
    asked = chat()
    assert with_defaults(asked, worker(defaults=AUTHORS)).digest == asked.digest
    assert with_defaults(asked, worker()) is asked


def test_neutral_values_in_a_request_are_kept():
    """`top_k: 0` and `top_p: 1` say "off", and stay off."""
    asked = chat(top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0)
    assert with_defaults(asked, worker(defaults=AUTHORS)).generation == asked.generation


def test_a_response_repeats_the_numbers_that_were_used():
    """A Response tells the `top_p` it was drawn with."""
    asked = parse_response({"input": "x"}, SETTINGS)
    assert with_defaults(asked, worker(defaults=AUTHORS)).response.top_p == 0.95


def test_what_the_authors_set_is_read_from_their_file():
    """Only what stands in the file and is within a request's range counts."""
    config = GenerationConfig(top_k=20, top_p=0.95, temperature=0.6, min_p=7.0, do_sample=True)
    assert sampling_defaults(config) == {"top_k": 20.0, "top_p": 0.95}
    assert sampling_defaults(GenerationConfig()) == sampling_defaults(None) == {}


@pytest.mark.parametrize(
    ("text", "refused"),
    [("y" * 1270, False), ("y" * 1271, True), (" y" * 1271, True), (" \n" * 9000, False)],
)
def test_a_text_that_cannot_fit_is_refused_with_both_numbers(text, refused):
    """10 bytes for a token at most, 128 tokens: 1,271 bytes are too many, white space aside."""
    asked = chat(text)
    if not refused:
        check_fits(asked, [worker()])
        return
    with pytest.raises(UnbrokenError) as caught:
        check_fits(asked, [worker(context_length=64), worker()])
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")
    assert "128 tokens" in caught.value.message
    assert "at least 128." in caught.value.message


def test_more_tokens_than_fit_are_a_bound_but_not_a_duty():
    """`max_tokens` above the context ends there; `min_tokens` above it can never be kept."""
    check_fits(chat(max_tokens=5000), [worker()])
    with pytest.raises(UnbrokenError) as caught:
        check_fits(chat(max_tokens=5000, min_tokens=128), [worker()])
    assert caught.value.param == "min_tokens"


def test_where_tokens_are_not_known_the_worker_decides():
    """Without a bound on a token's length, no text is refused."""
    check_fits(chat("y" * 10**6), [worker(token_bytes=0)])


@given(st.text(st.sampled_from("ay\u00fc \n\x1c\u00a0\u2003\u3000"), max_size=60))
def test_text_is_counted_once_as_the_body_is_read(text):
    """White space of any kind aside; what is compared later is that number, not the text."""
    asked = chat("x" + text)
    assert asked.text_bytes == sum(len(word.encode()) for word in ("x" + text).split())
    emptied = msgspec.structs.replace(asked.generation, messages=())
    with pytest.raises(UnbrokenError):
        check_fits(asked._replace(generation=emptied, text_bytes=1271), [worker()])


async def test_a_request_has_the_room_of_the_roomiest_worker():
    """All ready workers of the model count, not the oldest alone."""

    class Fleet:
        async def live(self):
            small = msgspec.structs.replace(worker(context_length=64), since=1)
            return [msgspec.structs.replace(worker(), id="v", since=2), small]

    class Services:
        settings = SETTINGS

    serving = await ReadyModels(Fleet()).serving()
    assert [[one.context_length for one in workers] for workers in serving] == [[64, 128]]
    assert _suited(serving, chat("y" * 1270), Services())[0].context_length == 64
    with pytest.raises(UnbrokenError, match="128 tokens"):
        _suited(serving, chat("y" * 1271), Services())


def test_functions_and_earlier_calls_cost_tokens():
    """A key's tokens per minute pay for all that reaches the prompt."""
    function = {"name": "look", "description": "d" * 4000}
    call = {"function": {"name": "look", "arguments": "a" * 4000}}
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}]
    plain = cost(chat().generation)
    assert cost(chat(tools=[{"type": "function", "function": function}]).generation) > plain + 1000
    assert cost(parse_chat({"messages": turns}, SETTINGS).generation) > plain + 1000


@given(st.text(max_size=60))
def test_no_token_stands_for_more_text_than_is_said(tokenizer, text):
    """Whatever the text, it has at least as many tokens as its bytes allow, so none is wronged."""
    count = len(tokenizer.encode(text, add_special_tokens=False))
    assert len(text.encode()) <= count * longest_token(tokenizer)


def test_a_tokenizer_that_rewrites_text_gives_no_bound(tokenizer):
    """Where a normalizer may drop text, its length says nothing."""
    backend = msgspec.json.decode(tokenizer.backend_tokenizer.to_str())
    backend["normalizer"] = {"type": "Replace", "pattern": {"String": "y"}, "content": ""}
    other = type(tokenizer.backend_tokenizer).from_str(msgspec.json.encode(backend).decode())

    class Rewriting:
        backend_tokenizer = other

    assert longest_token(Rewriting()) == 0
    assert longest_token(tokenizer) > 10
