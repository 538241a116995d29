"""The sampler against Transformers' own processors, and its independence from the batch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from shared.errors import UnbrokenError
from shared.protocol import SamplingParams
from worker.engine.messages import Prompt
from worker.engine.penalties import Penalties
from worker.engine.sampler import BAD_ROW, Sampler, mix64, uniform
from worker.engine.sequence import Sequence

V = 600
EOS = 7
CPU = torch.device("cpu")

VARIED: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.7},
    {"temperature": 1.3, "top_k": 5},
    {"temperature": 0.9, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    {"temperature": 1.5, "top_k": 50, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 0.8, "repetition_penalty": 1.3, "top_p": 0.99},
    {"temperature": 0.0, "repetition_penalty": 0.7, "logit_bias": {3: 4.5, 9: -100.0}},
    {"temperature": 1.1, "frequency_penalty": 0.5, "presence_penalty": 1.5},
    {"temperature": 1.0, "min_tokens": 40, "stop_token_ids": (11, 12), "top_k": 100},
    {"temperature": 2.0, "top_p": 0.999},
]


def make_row(
    handle: int, *, prompt: list[int] | None = None, output: list[int] | None = None, **kwargs: Any
) -> Sequence:
    generator = np.random.default_rng(handle)
    prompt = generator.integers(0, V, 25).tolist() if prompt is None else prompt
    output = generator.integers(0, V, 12).tolist() if output is None else output
    sampling = SamplingParams(**{"seed": 1000 + handle, **kwargs})
    return Sequence(handle, Prompt(prompt), sampling, frozenset({EOS}), 8192, tuple(output))


def varied_rows() -> list[Sequence]:
    return [make_row(i, **kwargs) for i, kwargs in enumerate(VARIED)]


def random_logits(rows: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * scale


def transformers_scores(row: Sequence, logits: torch.Tensor) -> torch.Tensor:
    """What `generate()` would draw from, [V]; the OpenAI penalties by their published formula."""
    s, ids = row.sampling, torch.tensor([row.prompt_ids + row.output_ids])
    before, after = LogitsProcessorList(), LogitsProcessorList()
    if s.logit_bias:
        before.append(SequenceBiasLogitsProcessor({(t,): b for t, b in s.logit_bias.items()}))
    if s.repetition_penalty != 1:
        before.append(RepetitionPenaltyLogitsProcessor(s.repetition_penalty))
    if s.min_tokens:
        ends = [EOS, *s.stop_token_ids]
        before.append(
            MinNewTokensLengthLogitsProcessor(len(row.prompt_ids), s.min_tokens, ends, device="cpu")
        )
    if s.temperature:
        after.append(TemperatureLogitsWarper(s.temperature))
    if s.top_k:
        after.append(TopKLogitsWarper(s.top_k))
    if s.top_p < 1:
        after.append(TopPLogitsWarper(s.top_p))
    if s.min_p:
        after.append(MinPLogitsWarper(s.min_p))
    scores = before(ids, logits[None].float()).clone()
    for token in set(row.output_ids):
        count = row.output_ids.count(token)
        scores[0, token] -= s.frequency_penalty * count + s.presence_penalty
    return after(ids, scores)[0]


def sweep(sampler: Sampler, row: Sequence, logits: torch.Tensor, monkeypatch) -> dict[int, float]:
    """Find the share of [0, 1) that each token gets, by drawing along a fine grid of numbers."""
    points = 2000
    monkeypatch.setattr("worker.engine.sampler.uniform", lambda seed, _: (seed + 0.5) / points)
    rows = [
        Sequence(i, row.prompt, row.sampling, row.eos_ids, 8192, tuple(row.output_ids))
        for i in range(points)
    ]
    for seed, each in enumerate(rows):
        each.seed = seed
    tokens = sampler.sample(logits.expand(points, -1), rows)
    values, counts = np.unique(tokens, return_counts=True)
    return dict(zip(values.tolist(), (counts / points).tolist(), strict=True))


@pytest.mark.parametrize("kwargs", [k for k in VARIED if k["temperature"]], ids=str)
def test_tokens_get_the_probabilities_transformers_gives_them(kwargs, monkeypatch):
    """Every token's share of the unit interval is its probability after Transformers' steps."""
    row, logits = make_row(3, **kwargs), random_logits(1, seed=5)
    expected = transformers_scores(row, logits[0]).softmax(-1)
    shares = sweep(Sampler(V, CPU), row, logits, monkeypatch)
    assert all(expected[token] > 0 for token in shares)
    for token in range(V):
        assert shares.get(token, 0.0) == pytest.approx(expected[token].item(), abs=3 / 2000)


def test_greedy_rows_take_the_best_score_of_transformers():
    """Greedy with bias and penalties gives the argmax of Transformers' processed scores."""
    sampler = Sampler(V, CPU)
    for seed in range(30):
        rows = [
            make_row(seed * 10 + i, **{**kwargs, "temperature": 0.0, "top_k": 0, "top_p": 1.0})
            for i, kwargs in enumerate(VARIED)
        ]
        logits = random_logits(len(rows), seed, scale=1.0)
        expected = [
            int(transformers_scores(r, x).argmax()) for r, x in zip(rows, logits, strict=True)
        ]
        assert sampler.sample(logits, rows) == expected


def test_edited_scores_equal_transformers_bit_by_bit():
    """Bias, repetition penalty and min_tokens give Transformers' float32 numbers exactly."""
    kwargs = {"temperature": 0.0, "repetition_penalty": 1.7, "logit_bias": {3: 4.5, 250: -0.3}}
    rows = [make_row(i, min_tokens=(0, 5, 20)[i % 3], **kwargs) for i in range(6)]
    logits = random_logits(6)
    edited = Penalties(V, CPU).apply(logits, rows)
    for i, row in enumerate(rows):
        assert torch.equal(edited[i], transformers_scores(row, logits[i]))


def test_penalties_follow_a_growing_output():
    """Counts kept from step to step are those of the whole output."""
    penalties = Penalties(V, CPU)
    kwargs = {"repetition_penalty": 1.2, "frequency_penalty": 0.4, "presence_penalty": -0.3}
    rows = [make_row(i, output=[], temperature=0.0, **kwargs) for i in range(4)]
    for step in range(150):
        logits = random_logits(4, seed=step, scale=0.5)
        edited = penalties.apply(logits, rows)
        for i, row in enumerate(rows):
            assert torch.allclose(edited[i], transformers_scores(row, logits[i]), atol=1e-5)
            row.output_ids.append(step % 40 if step % 3 else i)


def test_a_handle_used_again_starts_anew():
    """A row with the handle of an ended one does not inherit its counts."""
    sampler, logits = Sampler(V, CPU), torch.zeros(1, V)
    logits[0, 5] = 0.5
    used = make_row(1, output=[5, 5, 5], temperature=0.0, frequency_penalty=1.0)
    fresh = make_row(1, output=[], temperature=0.0, frequency_penalty=1.0)
    assert sampler.sample(logits, [used]) == [0]
    assert sampler.sample(logits, [fresh]) == [5]


def test_states_of_ended_rows_are_dropped():
    """The penalties' bookkeeping does not grow with the number of rows ever seen."""
    sampler = Sampler(V, CPU)
    for handle in range(500):
        sampler.sample(torch.zeros(1, V), [make_row(handle, presence_penalty=1.0)])
    assert len(sampler._penalties._tables) < 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_row_draws_the_same_alone_and_in_any_batch(dtype):
    """Alone, in a batch, or in a shuffled batch: bit by bit the same tokens, with ties too."""
    generator = np.random.default_rng(0)
    for step in range(12):
        rows = varied_rows()
        logits = random_logits(len(rows), step).to(dtype)
        if step % 3 == 0:
            logits = logits.round()  # ties everywhere
        together = Sampler(V, CPU).sample(logits, rows)
        alone = [Sampler(V, CPU).sample(logits[i : i + 1], [r])[0] for i, r in enumerate(rows)]
        order = [*generator.permutation(len(rows)).tolist(), 0, 3, 3]
        mixed = Sampler(V, CPU).sample(logits[order], [rows[i] for i in order])
        assert together == alone
        assert mixed == [together[i] for i in order]


@pytest.mark.parametrize("size", [600, 4096, 5003, 16384])
def test_the_numbers_behind_a_draw_do_not_depend_on_the_batch(size):
    """Softmax and sums of a row are bitwise the same for batches of 1 to 33 rows."""
    sampler = Sampler(size, CPU)
    logits = torch.randn(33, size, generator=torch.Generator().manual_seed(1))
    rows = [make_row(i, temperature=0.83) for i in range(33)]
    chunk = sampler._chunk

    def numbers(first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        mass = sampler._softmax(logits[first:last], rows[first:last]).clone()
        padded = torch.nn.functional.pad(mass, (0, -size % chunk))
        return mass, padded.view(last - first, -1, chunk).sum(-1)

    mass, sums = numbers(0, 33)
    for first, last in [(0, 1), (5, 6), (7, 9), (0, 17), (16, 33)]:
        part = numbers(first, last)
        assert torch.equal(part[0], mass[first:last])
        assert torch.equal(part[1], sums[first:last])


def test_seed_and_position_decide_the_draw():
    """The same seed and position give the same token; another of either gives other ones."""
    sampler, logits = Sampler(V, CPU), torch.zeros(1, V)

    def draws(seed: int, start: int = 0) -> list[int]:
        rows = [make_row(0, output=[0] * p, seed=seed) for p in range(start, start + 20)]
        return sampler.sample(logits.expand(20, -1), rows)

    assert draws(1) == draws(1)
    assert draws(1)[5:] == draws(1, start=5)[:15]
    assert sum(a == b for a, b in zip(draws(1), draws(2), strict=True)) <= 2
    assert len(set(draws(3))) > 10


def test_top_k_is_the_same_whatever_the_others_ask_for():
    """A narrow row keeps its tokens beside one that looks at many more, with ties at the edge."""
    sampler = Sampler(V, CPU)
    logits = (random_logits(2, scale=1.0) * 2).round()
    for seed in range(40):
        narrow = make_row(0, temperature=1.5, top_k=9, seed=seed)
        broad = make_row(1, temperature=1.5, top_k=500, seed=seed)
        assert sampler.sample(logits, [narrow, broad])[0] == sampler.sample(logits[:1], [narrow])[0]


@pytest.mark.parametrize(
    "kwargs",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 8},
        {"temperature": 1.2, "top_p": 0.9},
        {"temperature": 1.0, "min_p": 0.3},
    ],
    ids=str,
)
def test_draws_follow_the_distribution(kwargs):
    """A chi-square test over 20,000 positions of a seed does not tell draws from probabilities."""
    size, draws = 40, 20_000
    logits = torch.randn(1, size, generator=torch.Generator().manual_seed(2))
    rows = [make_row(i, prompt=[], output=[], seed=77, **kwargs) for i in range(1)]
    expected = transformers_scores(rows[0], logits[0]).softmax(-1).double().numpy() * draws
    sampler, counts, row = Sampler(size, CPU), np.zeros(size), rows[0]
    for start in range(0, draws, 1000):
        batch = [row.__class__(0, row.prompt, row.sampling, row.eos_ids, 8192) for _ in range(1000)]
        for i, each in enumerate(batch):
            each.output_ids = range(start + i)  # type: ignore[assignment]  # only its length counts
        counts += np.bincount(sampler.sample(logits.expand(1000, -1), batch), minlength=size)
    assert counts[expected == 0].sum() == 0
    kept = expected > 5
    freedom = int(kept.sum()) - 1
    chi_square = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    # Mean and spread of chi-square; four spreads are far beyond chance and near any real fault.
    assert abs(chi_square - freedom) < 4 * math.sqrt(2 * freedom)


def test_the_generator_is_splitmix64():
    """Outputs equal the reference implementation's for its well-known seed 1234567."""
    gamma = 0x9E3779B97F4A7C15
    assert [mix64(1234567 + i * gamma) for i in range(1, 6)] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_uniform_numbers_are_even_and_independent():
    """Numbers lie in [0, 1), evenly, also for neighbouring seeds and for seeds beyond 64 bits."""
    grid = np.array([[uniform(seed, p) for p in range(200)] for seed in range(-100, 100)])
    assert ((grid >= 0) & (grid < 1)).all()
    assert abs(grid.mean() - 0.5) < 0.005
    assert np.abs(np.corrcoef(grid[:50])[np.triu_indices(50, 1)]).max() < 0.35
    assert 0 <= uniform(2**80 + 1, 0) < 1
    assert uniform(-1, 0) != uniform(1, 0)
    assert uniform(1 + 0x9E3779B97F4A7C15, 0) != uniform(1, 1)


@pytest.mark.parametrize("kwargs", VARIED, ids=str)
@pytest.mark.parametrize("fault", [math.nan, math.inf, "all -inf"])
def test_a_row_without_sound_logits_fails_alone(kwargs, fault):
    """NaN, +inf or nothing finite gives -1 for that row; its neighbours draw as ever."""
    rows = [make_row(i, **kwargs) for i in range(3)]
    logits = random_logits(3)
    expected = Sampler(V, CPU).sample(logits, rows)
    if fault == "all -inf":
        logits[1] = -math.inf
    else:
        logits[1, 123] = fault
    assert Sampler(V, CPU).sample(logits, rows) == [expected[0], BAD_ROW, expected[2]]


@pytest.mark.parametrize("kwargs", [{"top_k": 500}, {"top_p": 0.999}, {"min_p": 1e-9}, {}], ids=str)
def test_masked_tokens_are_never_drawn(kwargs, monkeypatch):
    """Tokens at -inf stay out, also where a filter would keep more tokens than are left."""
    logits = torch.full((1, V), -math.inf)
    logits[0, [4, 77, 500]] = torch.tensor([1.0, 1.0, 0.5])
    shares = sweep(Sampler(V, CPU), make_row(0, temperature=1.0, **kwargs), logits, monkeypatch)
    assert shares.keys() == {4, 77, 500}


@pytest.mark.parametrize("number", [0.0, 1 - 2.0**-53])
def test_the_ends_of_the_unit_interval_give_tokens_that_have_mass(number, monkeypatch):
    """The smallest and the largest number draw the first and the last possible token."""
    monkeypatch.setattr("worker.engine.sampler.uniform", lambda *_: number)
    logits = torch.full((1, V), -math.inf)
    logits[0, 30:90] = 0.1
    for kwargs in ({}, {"top_k": 100}, {"top_p": 0.9999999}):
        token = Sampler(V, CPU).sample(logits, [make_row(0, **kwargs)])[0]
        assert token == (89 if number else 30)


def test_filters_that_keep_one_token_are_greedy():
    """top_k 1, top_p 0, min_p 1 and a temperature near 0 all give the best token."""
    logits = random_logits(6)
    choices = ({"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}, {"temperature": 1e-9})
    for kwargs in (*choices, {"temperature": 1e-4}, {"temperature": 2e-5, "top_p": 0.5}):
        rows = [make_row(i, **kwargs) for i in range(6)]
        assert Sampler(V, CPU).sample(logits, rows) == logits.argmax(-1).tolist()


def test_the_logits_are_left_as_they_are():
    """Sampling writes nothing into the caller's tensor."""
    rows, logits = varied_rows(), random_logits(len(VARIED))
    before = logits.clone()
    Sampler(V, CPU).sample(logits, rows)
    assert torch.equal(before, logits)


@pytest.mark.parametrize("make", [lambda x: x[:, -1], lambda x: x[:, 0].T.contiguous().T])
def test_logits_may_have_any_strides(make):
    """Logits that are a view into `[B, L, V]`, or transposed, draw as a plain copy does."""
    logits = make(torch.randn(len(VARIED), 3, V))
    expected = Sampler(V, CPU).sample(
        logits.clone(memory_format=torch.contiguous_format), varied_rows()
    )
    assert Sampler(V, CPU).sample(logits, varied_rows()) == expected


def test_scores_that_tie_in_float32_give_the_first_token():
    """Greedy on float64 logits takes what `generate()`, which samples in float32, takes."""
    logits = torch.zeros(1, V, dtype=torch.float64)
    logits[0, [5, 8]] = torch.tensor([1.0, 1.0 + 1e-12], dtype=torch.float64)
    assert Sampler(V, CPU).sample(logits, [make_row(0, temperature=0.0)]) == [5]


def test_a_nucleus_that_ends_exactly_at_top_p_takes_no_further_token(monkeypatch):
    """Of four equal tokens, top_p 0.5 keeps two: those with the smaller ids."""
    logits = torch.full((1, V), -math.inf)
    logits[0, [4, 77, 300, 500]] = 1.0
    row = make_row(0, temperature=1.0, top_p=0.5)
    assert sweep(Sampler(V, CPU), row, logits, monkeypatch) == {4: 0.5, 77: 0.5}


def test_logits_of_another_width_are_refused():
    """A model whose logits are not V wide is an error, not a wrong draw."""
    with pytest.raises(ValueError, match="599"):
        Sampler(V, CPU).sample(torch.zeros(1, V - 1), [make_row(0)])


@pytest.mark.parametrize("token", [-1, V])
def test_a_bias_for_an_unknown_token_is_refused(token):
    """`check` names the field at fault; `sample` itself is not harmed by such a bias."""
    sampler, row = Sampler(V, CPU), make_row(0, temperature=0.0, logit_bias={token: 50.0})
    with pytest.raises(UnbrokenError) as caught:
        sampler.check(row.sampling)
    assert (caught.value.code, caught.value.param) == ("invalid_value", "logit_bias")
    logits = random_logits(1)
    assert sampler.sample(logits, [row]) == logits.argmax(-1).tolist()
    sampler.check(SamplingParams(logit_bias={0: 1.0, V - 1: -1.0}))
