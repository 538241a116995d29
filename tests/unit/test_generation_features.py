"""What requests may ask of a generation, against `generate()` with the same options."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from shared.protocol import SamplingParams
from tests.engine_kit import Driver, config, text_prompt
from tests.stack import ROOT
from worker.demo_model import ensure_demo_model
from worker.engine.engine import Engine
from worker.engine.loader import load

pytestmark = pytest.mark.timeout(120)  # a real model, on machines that may be busy

MOST = 16


@pytest.fixture(scope="module")
def loaded():
    folder = ensure_demo_model(ROOT / "models" / "demo-fast")
    return load(config(folder), lambda _stage, _fraction: None)


def generated(loaded, prompt, **options) -> list[int]:
    """What `generate()` answers greedily."""
    ids = torch.tensor([prompt.input_ids])
    answer = loaded.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        **{"max_new_tokens": MOST, **options},
    )
    return answer[0, ids.shape[1] :].tolist()


def engine_ids(loaded, prompt, **sampling) -> Driver:
    driver = Driver(Engine(loaded, 2))
    params = SamplingParams(**{"temperature": 0, "max_tokens": MOST, **sampling})
    driver.add(1, text_prompt(12, 9), SamplingParams(temperature=0, max_tokens=MOST))
    driver.add(2, prompt, params)
    return driver.drain()


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"repetition_penalty": 1.3}, {"repetition_penalty": 1.3}),
        ({"repetition_penalty": 0.8}, {"repetition_penalty": 0.8}),
        ({"logit_bias": {17: 3.0, 40: -9.0}}, {"sequence_bias": {(17,): 3.0, (40,): -9.0}}),
        ({"max_tokens": 5}, {"max_new_tokens": 5}),
    ],
    ids="-".join,
)
def test_an_option_gives_the_tokens_that_generate_gives(loaded, ours, theirs):
    """Penalties, biases and bounds, beside a row that asks for nothing."""
    prompt = text_prompt(15, 3)
    assert engine_ids(loaded, prompt, **ours).ids(2) == generated(loaded, prompt, **theirs)


def test_each_of_the_models_ends_is_one(loaded):
    """With a list of EOS tokens the first that comes ends it; before `min_tokens` none can."""
    prompt = text_prompt(15, 3)
    plain = generated(loaded, prompt, eos_token_id=None, pad_token_id=0)
    ends = sorted({plain[4], plain[7]})
    listed = dataclasses.replace(loaded, eos_ids=frozenset(ends))
    for least in (0, 6):
        expected = generated(
            loaded, prompt, eos_token_id=ends, pad_token_id=0, min_new_tokens=least or None
        )
        driver = engine_ids(listed, prompt, min_tokens=least)
        assert driver.ids(2) == expected
        assert driver.last(2).finish == ("stop" if expected[-1] in ends else "length")


def test_a_stop_string_over_tokens_ends_where_generate_ends(loaded):
    """The last token is the one that completes it, wherever in a token it begins and ends."""
    prompt = text_prompt(15, 3)
    plain = generated(loaded, prompt, eos_token_id=None, pad_token_id=0)
    text = loaded.tokenizer.decode(plain)
    checked = 0
    for at in range(2, len(text) // 2, len(text) // 8):
        stop = text[at : at + 5]
        if "\ufffd" in stop or "<" in stop:
            continue
        expected = generated(
            loaded, prompt, eos_token_id=None, pad_token_id=0,
            stop_strings=[stop], tokenizer=loaded.tokenizer,
        )  # fmt: skip
        driver = engine_ids(loaded, prompt, stop=(stop,), ignore_eos=True)
        assert driver.ids(2) == expected
        assert driver.text(2) == text[: text.index(stop)]
        checked += 1
    assert checked >= 2
