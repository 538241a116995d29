"""Log probabilities from the model's logits to the client's JSON."""

from __future__ import annotations

import json

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE

from shared.protocol import (
    Delta,
    Finished,
    SamplingParams,
    Scored,
    ScoredDelta,
    TokenScores,
    Usage,
    decode_event,
    encode_event,
)
from tests.engine_kit import Driver, config, image_prompt, text_prompt
from worker.demo_model import ensure_demo_model
from worker.engine.torchvision_shim import prepare_torchvision

prepare_torchvision()  # before anything imports transformers
# ruff: noqa: E402

from transformers import PreTrainedTokenizerFast

from gateway import sse
from gateway.openai import parse_chat
from gateway.render import ChunkRenderer, CompletionBuilder
from shared.session_log import SessionRecord
from shared.settings import GatewaySettings
from tests.stack import ROOT
from worker.engine.detokenizer import Detokenizer
from worker.engine.engine import Engine
from worker.engine.loader import load
from worker.engine.logprobs import TokenTexts
from worker.engine.messages import Prompt
from worker.engine.sampler import BAD_ROW
from worker.engine.sequence import Sequence

pytestmark = pytest.mark.timeout(120)  # real models, on machines that may be busy


@pytest.fixture(scope="module")
def loaded():
    folder = ensure_demo_model(ROOT / "models" / "demo-fast")
    return load(config(folder), lambda _stage, _fraction: None)


def test_a_row_that_is_drawn_again_is_scored_once(loaded, monkeypatch):
    """Where one row's scores cannot be made, it fails alone, and the others' are not doubled."""
    drawer = Engine(loaded, 4).drawer
    rows = [
        Sequence(i, text_prompt(3), SamplingParams(temperature=0, logprobs=1), (), 100)
        for i in range(3)
    ]
    logits = torch.zeros(3, drawer.masks._vocab_size)
    logits[range(3), [20, 30, 40]] = 9.0
    of = drawer._scorer._texts.of
    monkeypatch.setattr(drawer._scorer._texts, "of", lambda t: of(t) if t != 30 else 1 / 0)
    assert drawer.draw(logits, rows) == [20, BAD_ROW, 40]
    assert [len(row.scores) for row in rows] == [1, 0, 1]


@pytest.fixture(scope="module")
def tokenizer(loaded):
    return loaded.tokenizer


def scores_of(driver, handle, channel=None):
    pieces = [p for o in driver.said[handle] for p in o.pieces if channel in (None, p.channel)]
    return [scores for piece in pieces for scores in piece.scores]


def text_of(scores) -> str:
    parts = [s.drawn.token for s in scores]
    raw = b"".join(p.encode() if isinstance(p, str) else bytes(p) for p in parts)
    return raw.decode(errors="replace")


@pytest.mark.parametrize("kind", ["text", "image"])
def test_they_are_the_log_softmax_of_the_models_own_logits(loaded, kind):
    """Beside rows that ask for none, whatever bias, penalties and temperature the draw had."""
    prompt = text_prompt(9) if kind == "text" else image_prompt(loaded, seed=2)
    asked = SamplingParams(
        temperature=1.4, top_k=30, seed=5, max_tokens=14, ignore_eos=True, logprobs=20,
        frequency_penalty=1.0, logit_bias={9: 5.0},
    )  # fmt: skip
    driver = Driver(Engine(loaded, 4))
    driver.add(1, text_prompt(20), msgspec.structs.replace(asked, logprobs=None))
    driver.add(2, prompt, asked)
    driver.add(3, text_prompt(5), msgspec.structs.replace(asked, logprobs=0))
    driver.drain()
    assert not scores_of(driver, 1)
    assert all(scores.top == () for scores in scores_of(driver, 3))
    ids = driver.ids(2)
    whole = torch.tensor([[*prompt.input_ids, *ids]])
    tensors = {name: torch.from_numpy(array) for name, array in prompt.tensors.items()}
    if "mm_token_type_ids" in tensors:
        kinds = tensors["mm_token_type_ids"]
        tensors["mm_token_type_ids"] = torch.nn.functional.pad(kinds, (0, len(ids)))
    if "pixel_values" in tensors:
        tensors["pixel_values"] = tensors["pixel_values"].to(loaded.model.dtype)
    with torch.inference_mode():
        logits = loaded.model(input_ids=whole, **tensors).logits[0, len(prompt.input_ids) - 1 : -1]
    expected = logits.log_softmax(-1)
    texts = TokenTexts(loaded.tokenizer)
    shown = [i for i, token in enumerate(ids) if token not in loaded.tokenizer.all_special_ids]
    found = scores_of(driver, 2)
    assert len(found) == len(shown) > 5
    for at, scores in zip(shown, found, strict=True):
        assert scores.drawn.token == texts.of(ids[at])
        assert scores.drawn.logprob == pytest.approx(float(expected[at, ids[at]]), abs=1e-6)
        best = expected[at].topk(20)
        assert [s.logprob for s in scores.top] == pytest.approx(best.values.tolist(), abs=1e-6)
        assert [s.token for s in scores.top] == [texts.of(i) for i in best.indices.tolist()]


def test_a_continued_sequence_tells_each_once(loaded):
    """From any seam of the log on, what was told before and after is what an undisturbed run tells.

    Stop strings hold tokens back, and the seam may fall among them.
    """
    sampling = SamplingParams(
        temperature=1.2, seed=3, max_tokens=20, ignore_eos=True, logprobs=2, stop=("zzz", " a b")
    )
    driver = Driver(Engine(loaded, 8))
    driver.add(0, text_prompt(9), sampling)
    pieces = [piece for o in driver.drain().said[0] for piece in o.pieces]
    for seam in range(1, len(pieces) + 1, 3):
        known = [i for piece in pieces[:seam] for i in piece.ids]
        driver.add(seam, text_prompt(9), sampling, known)
    driver.drain()
    for seam in range(1, len(pieces) + 1, 3):
        told = [s for piece in pieces[:seam] for s in piece.scores]
        assert told + scores_of(driver, seam) == scores_of(driver, 0)


def test_tokens_of_a_channel_spell_its_text(loaded):
    """Neither the end of a thought, nor EOS, nor a stop string has an entry; all else has one."""
    driver = Driver(Engine(loaded, 8))
    close = loaded.tokenizer.convert_tokens_to_ids("</think>")
    bias = {close: 4.0}
    for seed in range(10):
        prompt = text_prompt(9, seed)
        prompt = Prompt(prompt.input_ids, thinking=bool(seed % 3))
        sampling = SamplingParams(
            temperature=1.0, seed=seed, max_tokens=24, logprobs=1, logit_bias=bias
        )
        driver.add(seed, prompt, sampling)
    driver.drain()
    channels = set()
    for seed in range(10):
        for channel in ("content", "reasoning"):
            pieces = [p for o in driver.said[seed] for p in o.pieces if p.channel == channel]
            text = "".join(piece.text for piece in pieces)
            spelled = text_of(scores_of(driver, seed, channel))
            assert spelled.lstrip("\n") == text or spelled == text
            channels |= {channel} if text else set()
    assert channels == {"content", "reasoning"}


@given(st.lists(st.integers(0, 700), max_size=30), st.booleans())
def test_marked_tokens_are_those_with_text(tokenizer, ids, thinking):
    """Whatever the tokens, those of a piece that are marked spell its text."""
    detokenizer = Detokenizer(tokenizer, thinking=thinking)
    detokenizer.marks = []
    pieces = [piece for token in ids for piece in detokenizer.push(token)]
    pieces += detokenizer.finish()
    assert [i for piece in pieces for i in piece.ids] == ids
    texts = TokenTexts(tokenizer)
    silent = {*tokenizer.all_special_ids, *range(len(tokenizer), 800)}
    marks = iter(detokenizer.marks)
    for piece in pieces:
        shown = [i for i in piece.ids if next(marks)]
        assert not silent.intersection(shown)
        raws = [t.encode() if isinstance(t, str) else bytes(t) for t in map(texts.of, shown)]
        spelled = b"".join(raws).decode(errors="replace")
        assert piece.text in spelled if piece.text else not shown


def test_tokens_have_their_text_or_their_bytes(tokenizer):
    """Half of a character is told by its bytes, a special token by its name, padding by nothing."""
    texts = TokenTexts(tokenizer)
    halves = [texts.of(i) for i in tokenizer.encode("🜚", add_special_tokens=False)]
    assert any(isinstance(half, tuple) for half in halves)
    raw = b"".join(h.encode() if isinstance(h, str) else bytes(h) for h in halves)
    assert raw.decode() == "🜚"
    assert texts.of(tokenizer.convert_tokens_to_ids("<|im_end|>")) == "<|im_end|>"
    assert texts.of(len(tokenizer) + 1) == ""


def test_sentencepiece_tokens_have_their_space_and_their_bytes():
    """A space spelled as ▁ and a byte spelled as <0xNN> reach clients as what they stand for."""
    model = BPE({"▁the": 0, "<0xE2>": 1, "x": 2}, [], byte_fallback=True)
    backend = Tokenizer(model)
    backend.decoder = decoders.Metaspace()
    texts = TokenTexts(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert [texts.of(i) for i in range(3)] == [" the", (0xE2,), "x"]


def events():
    half = TokenScores(Scored(-1.5, (0xC3,)), (Scored(-0.1, "a"),))
    rest = TokenScores(Scored(-0.25, (0xA9,)), (Scored(-0.25, (0xA9,)),))
    thought = TokenScores(Scored(-0.5, "hm"), ())
    return [
        ScoredDelta(0, (1,), "hm", "reasoning", (thought,)),
        ScoredDelta(0, (2, 3), "é", "content", (half, rest)),
        ScoredDelta(1, (4,), "", "content", ()),
        Finished(("stop", "stop"), Usage(1, 4)),
    ]


def record():
    return SessionRecord("", "d", "m", "fp", 2, "running", 0, 7, 0.0)


def test_deltas_carry_them_and_a_whole_answer_has_them_all():
    """A stream's entries, joined, are those of the whole answer; thoughts have a list of theirs."""
    encoded = [encode_event(event) for event in events()]
    data, ended = sse.Frames("s", ChunkRenderer("s", record(), include_usage=False)).render(
        1, encoded
    )
    assert ended
    chunks = [json.loads(line[6:]) for line in data.decode().split("\n") if line[:7] == "data: {"]
    found = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert found[0]["reasoning_content"][0]["token"] == "hm"
    assert found[0]["content"] == found[2]["content"] == []
    assert found[3] is None
    first, second = found[1]["content"]
    assert first == {
        "token": "\ufffd",
        "bytes": [0xC3],
        "logprob": -1.5,
        "top_logprobs": [{"token": "a", "bytes": [97], "logprob": -0.1}],
    }
    builder = CompletionBuilder("s", record())
    *_, answer = [builder.add(decode_event(event)) for event in encoded]
    whole = answer["choices"][0]["logprobs"]
    assert whole["content"] == [first, second]
    assert whole["reasoning_content"] == found[0]["reasoning_content"]
    assert answer["choices"][1]["logprobs"] == {"content": [], "refusal": None}


def test_events_without_them_are_as_small_as_ever():
    """A plain delta's bytes in the log do not know of them."""
    assert encode_event(Delta(0, (1234,), " word")) == b'["d",0,[1234]," word","content"]'


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"logprobs": False}, None),
        ({"logprobs": None, "top_logprobs": None}, None),
        ({"top_logprobs": 0}, None),
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 20}, 20),
    ],
)
def test_requests_say_how_many(fields, expected):
    """`top_logprobs` counts only beside `logprobs`."""
    body = {"messages": [{"role": "user", "content": "x"}], **fields}
    settings = GatewaySettings(_env_file=None)
    assert parse_chat(body, settings).generation.sampling.logprobs == expected
