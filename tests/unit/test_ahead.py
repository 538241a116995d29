"""Steps that run ahead of the host: what a client sees is what it sees of plain steps."""

import dataclasses

import msgspec
import pytest
import torch

from shared.protocol import SamplingParams
from tests.engine_kit import Driver, config, image_prompt, text_prompt
from worker.demo_model import ensure_demo_model
from worker.engine.torchvision_shim import prepare_torchvision

prepare_torchvision()  # before anything imports transformers
# ruff: noqa: E402

from worker.engine import device_draw
from worker.engine.bucketed import BucketOptions
from worker.engine.device_draw import FIELDS, UNDECIDED, draw, drawable, parameters
from worker.engine.engine import Engine
from worker.engine.holding import Holding
from worker.engine.loader import load
from worker.engine.messages import Abort, Cancel, Prompt
from worker.engine.model_runner import ModelRunner
from worker.engine.sampler import BAD_ROW, Sampler
from worker.engine.sequence import Chunk, Sequence

pytestmark = pytest.mark.timeout(120)  # real models, on machines that may be busy
LIMIT = 400
LONG = SamplingParams(temperature=0.8, top_k=20, seed=5, max_tokens=16, ignore_eos=True)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The demo model, decoded in plain steps."""
    folder = ensure_demo_model(tmp_path_factory.mktemp("models") / "demo")
    return load(config(folder, context_length=LIMIT), lambda *_: None)


@pytest.fixture(scope="module")
def engines(plain):
    """One engine that runs ahead, and one that decodes plainly; both idle after each test."""
    return Engine(dataclasses.replace(plain, bucketed=BucketOptions()), 8), Engine(plain, 8)


@pytest.fixture
def ahead(engines, monkeypatch):
    """A driver of the first; `flown` counts the steps that it began ahead."""
    driver = Driver(engines[0])
    launch, driver.flown = driver.engine.runner.launch, 0

    def counted(rows):
        driver.flown += 1
        return launch(rows)

    monkeypatch.setattr(driver.engine.runner, "launch", counted)
    return driver


@pytest.fixture
def host(engines):
    """A driver of the second."""
    return Driver(engines[1])


def both(ahead, host, requests):
    """Run the same requests, which join one step after another, on both; compare all they say."""
    for driver in (ahead, host):
        for handle, (prompt, sampling) in enumerate(requests):
            driver.add(handle, prompt, sampling)
            driver.step()
        driver.drain()
    for handle in range(len(requests)):
        assert ahead.ids(handle) == host.ids(handle)
        assert ahead.text(handle) == host.text(handle)
        assert ahead.last(handle) == host.last(handle)


KINDS = {
    "greedy": SamplingParams(temperature=0, max_tokens=20),
    "anything": SamplingParams(temperature=1.0, seed=1, max_tokens=20, ignore_eos=True),
    "top_k": SamplingParams(temperature=1.3, top_k=7, seed=2, max_tokens=14),
    "top_p": SamplingParams(temperature=0.7, top_p=0.8, seed=3, max_tokens=18),
    "min_p": SamplingParams(temperature=1.1, min_p=0.1, seed=4, max_tokens=11),
    "all": SamplingParams(temperature=0.9, top_k=30, top_p=0.9, min_p=0.02, seed=5, max_tokens=9),
    "one token": SamplingParams(temperature=0.9, seed=6, max_tokens=1),
    "two": SamplingParams(temperature=0, max_tokens=2, ignore_eos=True),
}


def test_all_kinds_of_draws_that_join_and_leave_say_the_same(ahead, host, plain):
    """Requests of every kind at once: the same tokens, text, ends and counts as plain steps."""
    requests = [
        (image_prompt(plain, seed=n) if n % 3 == 1 else text_prompt(4 + n), sampling)
        for n, sampling in enumerate(KINDS.values())
    ]
    both(ahead, host, requests)
    assert ahead.flown > 10


@pytest.mark.parametrize("place", [1, 5, 6])
def test_a_stop_is_seen_late_and_nothing_behind_it_is_said(ahead, host, place):
    """Stop strings, stop tokens and the context's end: no text, id or count beyond them."""
    host.add(0, text_prompt(9), LONG)
    words, ids = host.drain().text(0), host.ids(0)
    host.said.clear()
    by_string = msgspec.structs.replace(LONG, stop=(words[place * 2 : place * 2 + 3],))
    by_token = msgspec.structs.replace(LONG, stop_token_ids=(ids[place],))
    by_length = msgspec.structs.replace(LONG, max_tokens=place)
    endless = msgspec.structs.replace(LONG, max_tokens=999)
    requests = [(text_prompt(9), s) for s in (by_string, by_token, by_length)]
    both(ahead, host, [*requests, (text_prompt(LIMIT - place), endless)])
    assert ahead.last(2).completion_tokens == place
    assert ahead.last(3).completion_tokens == place
    assert ahead.last(3).finish == "length"


def test_a_cancel_ends_with_the_next_token_and_an_abort_at_once(ahead, host):
    """What is in flight of them is dropped; the others, of which one moves, have all theirs."""
    for handle in range(4):
        ahead.add(handle, text_prompt(6 + handle), LONG)
    for _ in range(4):
        ahead.step()
    known = len(ahead.ids(0))
    ahead.engine.handle(Cancel(0, "requested"))
    ahead.engine.handle(Abort(1))
    ahead.said.pop(1, None)
    ahead.drain()
    assert (ahead.last(0).finish, ahead.last(0).cancelled) == ("stop", "requested")
    assert ahead.last(0).completion_tokens == known + 1
    assert 1 not in ahead.said
    for handle in (2, 3):
        host.add(handle, text_prompt(6 + handle), LONG)
    host.drain()
    assert [ahead.ids(n) for n in (2, 3)] == [host.ids(n) for n in (2, 3)]


def test_a_row_that_needs_the_host_takes_the_batch_along_and_gives_it_back(ahead, host):
    """Penalties and log probabilities are the host's: steps wait while such a row is there."""
    penal = SamplingParams(temperature=0.8, frequency_penalty=0.7, seed=1, max_tokens=6)
    told = SamplingParams(temperature=0, logprobs=2, max_tokens=5, ignore_eos=True)
    least = SamplingParams(temperature=0, min_tokens=9, max_tokens=12)
    both(
        ahead,
        host,
        [(text_prompt(5), LONG), (text_prompt(6), penal), (text_prompt(7), told)],
    )
    assert 0 < ahead.flown < 12
    ahead.said.clear()
    host.said.clear()
    both(ahead, host, [(text_prompt(5), least), (text_prompt(8), LONG)])


def test_a_row_put_back_for_want_of_memory_goes_on_with_the_same_tokens(ahead, host, monkeypatch):
    """A step ahead that finds no memory is the host's, and what was in flight is drawn again."""
    runner = ahead.engine.runner
    reserve = runner.reserve
    requests = [(text_prompt(5 + n), LONG) for n in range(3)]

    def narrow(rows):
        if len(rows) == 3 and max(len(s.output_ids) for s in rows) > 6:
            raise torch.OutOfMemoryError
        reserve(rows)

    monkeypatch.setattr(runner, "reserve", narrow)
    both(ahead, host, requests)


def test_a_row_of_numbers_that_are_not_finite_fails_alone(ahead, host):
    """It ends with an error; its neighbour, whose tokens are drawn beside it, goes on."""
    ahead.add(1, text_prompt(7), LONG)
    ahead.add(2, text_prompt(8), LONG)
    for _ in range(4):
        ahead.step()
    sick = next(s for s in ahead.engine.scheduler.running if s.handle == 1)
    with torch.inference_mode():
        for layer in ahead.engine.runner.cache.layers:
            layer.row(sick.slot, 3)[1].fill_(torch.nan)
    ahead.drain()
    assert ahead.last(1).error[0] == "generation_failed"
    host.add(2, text_prompt(8), LONG)
    assert host.drain().ids(2) == ahead.ids(2)
    ahead.add(3, text_prompt(30), LONG)
    host.add(3, text_prompt(30), LONG)
    assert ahead.drain().ids(3) == host.drain().ids(3)


def test_what_the_step_too_many_has_left_reaches_nobody(ahead, host, monkeypatch):
    """A stop is seen while its token is fed; the numbers of that step are not kept, but wiped."""
    prompt = text_prompt(40)
    monkeypatch.setattr(ahead.engine.prefixes, "_max_bytes", 2**24)
    host.add(0, prompt, LONG)
    ids = host.drain().ids(0)
    place = next(n for n in range(4, len(ids)) if ids[n] not in ids[:n])
    runner, poisoned = ahead.engine.runner, []
    launch = runner.launch

    def poisonous(rows):
        pending = launch(rows)
        if rows[0].length == 40 + place + 1:
            poisoned.append(rows[0].slot)
            with torch.inference_mode():
                for layer in runner.cache.layers:
                    for pool in layer.row(rows[0].slot, rows[0].length):
                        pool[:, -1] = torch.nan
            pending.tokens = lambda: [BAD_ROW]
        return pending

    with monkeypatch.context() as patched:
        patched.setattr(runner, "launch", poisonous)
        stopped = msgspec.structs.replace(LONG, stop_token_ids=(ids[place],))
        ahead.add(0, prompt, stopped)
        ahead.drain()
    assert ahead.ids(0) == ids[: place + 1]
    ahead.add(2, text_prompt(5), KINDS["two"])  # in the very slot
    host.add(2, text_prompt(5), KINDS["two"])
    assert ahead.drain().ids(2) == host.drain().ids(2)
    assert poisoned == [0]
    for layer in runner.cache.layers:
        assert all(bool(pool.isfinite().all()) for pool in layer.row(poisoned[0], 60))
    further = Prompt([*prompt.input_ids, *ids[: place + 1], 9, 9])
    for driver in (ahead, host):
        driver.add(1, further, LONG)
        driver.drain()
    assert ahead.ids(1) == host.ids(1)
    assert ahead.last(1).cached_tokens == 40 + place


def test_a_token_that_the_device_cannot_decide_is_the_hosts(ahead, host, monkeypatch):
    """A nucleus wider than the list: the row steps back, and its token is drawn there."""
    undecided = 0
    real = device_draw.draw

    def counted(*args):
        nonlocal undecided
        tokens = real(*args)
        undecided += int((tokens == UNDECIDED).sum())
        return tokens

    monkeypatch.setattr("worker.engine.bucketed.draw", counted)
    monkeypatch.setattr(device_draw, "LISTED", 64)
    wide = SamplingParams(temperature=1.6, top_p=0.97, seed=9, max_tokens=20, ignore_eos=True)
    both(ahead, host, [(text_prompt(6), wide), (text_prompt(8), LONG), (text_prompt(9), wide)])
    assert undecided > 0


def rows_of(samplings):
    return [
        Sequence(n, Prompt([1, 2]), sampling, frozenset(), LIMIT)
        for n, sampling in enumerate(samplings)
    ]


@pytest.mark.parametrize("vocab_size", [640, 1000])
def test_the_device_draws_what_the_host_draws(vocab_size):
    """Over many logits, with ties and rows that are not finite; where it cannot, it says so."""
    cpu = torch.device("cpu")
    sampler = Sampler(vocab_size, cpu)
    samplings = [msgspec.structs.replace(s, seed=n) for n, s in enumerate([*KINDS.values()] * 4)]
    rows = rows_of(samplings)
    draws = torch.Generator().manual_seed(1)
    undecided = 0
    for position in range(12):
        logits = torch.randn(len(rows), vocab_size, generator=draws) * (1 + position)
        logits[:, ::3] = logits[:, ::3].round()  # ties
        logits[3, 5], logits[7, 5], logits[9] = torch.nan, torch.inf, -torch.inf
        logits[11, 100:] = -torch.inf
        for row in rows:
            row.output_ids = [1] * position
        asked = torch.tensor([parameters(row, position) for row in rows], dtype=torch.float64).T
        assert asked.shape == (FIELDS, len(rows))
        found = draw(logits, asked, 128).tolist()
        expected = sampler.sample(logits, rows)
        undecided += found.count(UNDECIDED)
        assert [f for f in found if f != UNDECIDED] == [
            e for f, e in zip(found, expected, strict=True) if f != UNDECIDED
        ]
        assert [found[n] for n in (3, 7, 9)] == [BAD_ROW] * 3
    assert undecided < 40


def test_what_needs_the_host_is_not_drawn_by_the_device():
    """Penalties, biases, scores, and lists that are too wide."""
    host = [
        SamplingParams(frequency_penalty=0.1),
        SamplingParams(presence_penalty=-0.1),
        SamplingParams(repetition_penalty=1.1),
        SamplingParams(logit_bias={3: 1.0}),
        SamplingParams(logprobs=0),
        SamplingParams(min_tokens=1),
        SamplingParams(top_k=512),
    ]
    assert not any(map(drawable, rows_of(host)))
    assert all(map(drawable, rows_of(KINDS.values())))


def test_a_step_recorded_while_others_fly_feeds_what_was_drawn(plain, monkeypatch):
    """A recording runs its step some times over; a row's next input is not what those draw."""

    def rehearsed(step):
        for _ in range(3):
            step()
        return step

    monkeypatch.setattr("worker.engine.bucketed._as_it_is", rehearsed)
    greedy = SamplingParams(temperature=0, max_tokens=9)
    prompts = [text_prompt(6 + n, n) for n in range(3)]
    tokens = []
    for options in (None, BucketOptions()):
        runner = ModelRunner(plain.model, 3, LIMIT, bucketed=options)
        rows = [Sequence(n, prompt, greedy, frozenset(), LIMIT) for n, prompt in enumerate(prompts)]
        for row in rows:
            row.slot = row.handle
            runner.reserve([*rows[: row.slot + 1]])
            row.output_ids += runner.prefill([Chunk(row, row.target)]).argmax(-1).tolist()
        if options is None:
            for _ in range(3):
                for row, token in zip(rows, runner.decode(rows).argmax(-1).tolist(), strict=True):
                    row.output_ids.append(token)
            tokens.append([row.output_ids[1:] for row in rows])
        else:
            flown = [runner.launch(batch) for batch in (rows[:2], rows[:2], rows, rows[2:])]
            first, second, third, last = [pending.tokens() for pending in flown]
            fed = [[*each] for each in zip(first, second, third[:2], strict=True)]
            tokens.append([*fed, [third[2], *last]])
    tokens[0][2].pop()
    assert tokens[0] == tokens[1]


def test_what_begins_anew_with_a_step_in_flight_says_the_same(ahead, host, plain, monkeypatch):
    """A prompt that joins finds no memory to draw with: nothing in flight is lost or said twice."""
    whole = SamplingParams(temperature=0.9, top_k=20, seed=9, max_tokens=24, ignore_eos=True)
    requests = [(text_prompt(9), whole), (image_prompt(plain), whole), (text_prompt(30), LONG)]
    for handle, one in enumerate(requests):
        host.add(handle, *one)
    host.drain()
    for handle in (0, 1):
        ahead.add(handle, *requests[handle])
    while not ahead.flown:
        ahead.step()
    ahead.step()
    sift, failed = Holding.sift, []

    def scarce(holding, rows, logits, *, turn=True):
        if rows and not failed:
            failed.append(ahead.engine.ahead._pending is not None)
            raise torch.OutOfMemoryError
        return sift(holding, rows, logits, turn=turn)

    monkeypatch.setattr(Holding, "sift", scarce)
    ahead.add(2, *requests[2])
    ahead.drain()
    assert failed == [True]
    for handle in range(3):
        assert ahead.ids(handle) == host.ids(handle)
        assert ahead.text(handle) == host.text(handle)
