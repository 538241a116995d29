"""Decode steps of fixed shapes over the pooled cache give the tokens of plain ones."""

import dataclasses
import logging

import pytest
import torch

from shared.protocol import SamplingParams
from shared.settings import WorkerSettings
from tests.engine_kit import GREEDY, Driver, config, image_prompt, oracle, text_prompt
from worker.demo_model import ensure_demo_model
from worker.engine.torchvision_shim import prepare_torchvision

prepare_torchvision()  # before anything imports transformers
# ruff: noqa: E402

from benchmarks._gpu_model import TINY, build
from worker.engine import loader, ragged, runner_setup
from worker.engine.bucketed import KINDS, BucketedDecode, BucketOptions, best_options
from worker.engine.engine import Engine
from worker.engine.loader import load
from worker.engine.messages import Abort, Cancel, Limits
from worker.engine.model_runner import ModelRunner
from worker.engine.ragged import PAGE
from worker.engine.runner_setup import build_runner
from worker.engine.sequence import Chunk, Sequence
from worker.engine.token_pool import PooledCache
from worker.main import engine_config

pytestmark = [
    pytest.mark.timeout(120),  # real models, on machines that may be busy
    pytest.mark.filterwarnings("ignore:flex_attention called without"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),
]
LIMIT = 700  # tokens of a sequence: several pages


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The demo model."""
    return ensure_demo_model(tmp_path_factory.mktemp("models") / "demo")


@pytest.fixture(scope="module")
def plain(folder):
    """The demo model, decoded in plain steps."""
    return load(config(folder, context_length=LIMIT), lambda *_: None)


@pytest.fixture(scope="module")
def bucketed(plain):
    """The same, in bucketed steps."""
    return dataclasses.replace(plain, bucketed=BucketOptions())


@pytest.fixture(scope="module")
def engine(bucketed):
    """An engine takes seconds to make, and is idle after each test."""
    return Engine(bucketed, 8, limits=Limits(prefix_bytes=2**24))


@pytest.fixture
def driver(engine):
    """Its driver."""
    return Driver(engine)


SAMPLED = SamplingParams(temperature=1.5, seed=7, max_tokens=9, ignore_eos=True)


@pytest.fixture(scope="module")
def undisturbed(plain):
    """Two prompts, and what a plain engine answers."""
    driver = Driver(Engine(plain, 2))
    prompts = [text_prompt(9), image_prompt(plain, seed=4)]
    for handle, prompt in enumerate(prompts):
        driver.add(handle, prompt, SAMPLED)
    driver.drain()
    return [(prompt, driver.ids(handle)) for handle, prompt in enumerate(prompts)]


def mixed(loaded, count):
    """Every third prompt has a picture; their lengths differ, and some end at pages' edges."""
    sizes = (3, PAGE - 1, PAGE, PAGE + 1, 40)
    return [
        image_prompt(loaded, seed=n, side=(4, 6, 8)[n % 3])
        if n % 3 == 1
        else text_prompt(sizes[n % 5], n)
        for n in range(count)
    ]


def decoded(runner, prompts, steps):
    """Prefill all prompts into scattered rows; return the logits of each decode step."""
    rows = []
    for slot, prompt in enumerate(prompts):
        row = Sequence(slot, prompt, GREEDY, frozenset(), LIMIT)
        row.slot = slot
        rows.append(row)
    runner.reserve(rows)
    for row in rows:
        runner.prefill([Chunk(row, row.target)])
    found = []
    for step in range(steps):
        for row in rows:
            row.output_ids.append(20 + 7 * step + row.slot)
        runner.reserve(rows)
        found.append(runner.decode(rows))
    return torch.stack(found)


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_each_bucket_gives_the_logits_of_plain_steps(plain, count, fixed):
    """Batches that fill their bucket and such that do not, with pictures, over a page's edge."""
    options = BucketOptions(fixed=fixed)
    runner = ModelRunner(plain.model, 9, LIMIT, bucketed=options)
    assert runner.bucketed.buckets == ((16,) if fixed else (2, 4, 8, 16))
    prompts = mixed(plain, count)
    expected = decoded(ModelRunner(plain.model, 9, LIMIT), prompts, 3)
    torch.testing.assert_close(decoded(runner, prompts, 3), expected, rtol=1e-9, atol=1e-9)


def nowhere(options, rows):
    """Steps in half precision on a device that holds no numbers; flash kernels are only called."""
    if reason := ragged.unavailable(options.attention, torch.device("cuda"), torch.bfloat16):
        pytest.skip(reason)
    device, scale = torch.device("meta"), dataclasses.replace(TINY, dtype=torch.bfloat16)
    cache = PooledCache(scale.text["num_hidden_layers"], rows, LIMIT)
    state = torch.zeros(1, scale.text["num_key_value_heads"], 1, scale.text["head_dim"])
    for layer in cache.layers:
        layer.lazy_initialization(*[state.to(device, scale.dtype)] * 2)
    cache.reserve(rows, LIMIT)
    return BucketedDecode(build(scale, device), cache, options)


@torch.inference_mode()
def run_all(steps):
    """Run each kind of step in each size, the largest first."""
    for size in reversed(steps.buckets):
        found = {kind: tuple(steps._run(size, kind)().shape) for kind in KINDS}
        vocabulary = TINY.text["vocab_size"]
        assert found == {"logits": (size, vocabulary), "best": (size,), "drawn": (size,)}


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("path", [path for path in ragged.PATHS if path != "flex"])
def test_a_step_asks_nothing_of_the_host(path, fixed):
    """Every kind of step runs where there are no numbers: none waits for one."""
    run_all(nowhere(BucketOptions(path, fixed=fixed), 4))


def test_one_compilation_serves_all_sizes(monkeypatch):
    """The compiler sees a step once, as one graph, however many rows steps have."""
    seen, compiler = [], torch.compile

    def backend(graph, _inputs):
        seen.append(graph)
        return graph.forward

    def compile_with_it(step, *, dynamic, options):
        return compiler(step, backend=backend, fullgraph=True, dynamic=dynamic)

    monkeypatch.setattr(torch, "compile", compile_with_it)
    run_all(nowhere(BucketOptions("flash", compile=True), 5))
    assert len(seen) == 1


def test_another_attention_gives_the_same_logits(plain):
    """FlexAttention, which looks at the whole pool, in place of copied rows."""
    runner = ModelRunner(plain.model, 2, 300, bucketed=BucketOptions("flex"))
    prompts = [text_prompt(PAGE - 1), image_prompt(plain)]
    expected = decoded(ModelRunner(plain.model, 2, 300), prompts, 2)
    torch.testing.assert_close(decoded(runner, prompts, 2), expected, rtol=1e-9, atol=1e-9)


def test_rows_that_join_and_leave_give_the_tokens_of_generate(plain, driver):
    """Text and images, of which some end early, over moving rows and growing slots."""
    assert driver.engine.runner.attention == "sdpa"
    prompts, lengths = mixed(plain, 8), [9, 3, 11, 6, 7, 1, 12, 4]
    for handle, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        driver.add(handle, prompt, SamplingParams(temperature=0, max_tokens=length))
        for _ in range(handle % 3):
            driver.step()
    driver.drain()
    for handle, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        assert driver.ids(handle) == oracle(plain, prompt, length)


def test_cancelled_and_aborted_rows_leave_the_others_alone(plain, driver):
    """A cancelled row says so, an aborted one nothing, and the last row takes its place."""
    for handle in range(5):
        driver.add(handle, text_prompt(6 + handle))
    for _ in range(3):
        driver.step()
    driver.engine.handle(Cancel(0, "requested"))
    driver.engine.handle(Abort(1))
    driver.drain()
    assert (driver.last(0).finish, driver.last(0).cancelled) == ("stop", "requested")
    assert driver.last(1).finish is None
    for handle in (2, 3, 4):
        assert driver.ids(handle) == oracle(plain, text_prompt(6 + handle))


def continues(engine, prompt, whole):
    """Continue a sequence from every other seam of its log, all beside each other."""
    driver, seams = Driver(engine), range(0, len(whole) + 1, 2)
    for seam in seams:
        driver.add(seam, prompt, SAMPLED, whole[:seam])
        driver.step()
    driver.drain()
    assert [whole[:seam] + driver.ids(seam) for seam in seams] == [whole] * len(seams)


def test_a_continued_sequence_goes_on_as_the_undisturbed_one(engine, undisturbed):
    """From any seam of its log, among others."""
    for prompt, whole in undisturbed:
        assert len(whole) == SAMPLED.max_tokens
        continues(engine, prompt, whole)


def test_steps_of_one_shape_continue_exactly_in_half_precision(folder):
    """The log goes through the same steps once more: the very tokens, alone or among others."""
    half = load(config(folder, context_length=LIMIT, dtype="bfloat16"), lambda *_: None)
    assert half.replay
    engine = Engine(dataclasses.replace(half, bucketed=BucketOptions(fixed=True)), 8)
    for prompt in (text_prompt(9), image_prompt(half, seed=4)):
        alone = Driver(engine)
        alone.add(1, prompt, SAMPLED)
        continues(engine, prompt, alone.drain().ids(1))


def test_a_prefix_is_shared_between_rows_and_with_ended_ones(plain, driver):
    """Copies of rows, into and out of the pool, serve like a prefill."""
    for handle in (1, 2, 3):
        driver.add(handle, text_prompt(300))
        if handle != 2:
            driver.step()
            driver.step()
    driver.drain()
    driver.add(4, text_prompt(300))
    driver.drain()
    expected = oracle(plain, text_prompt(300))
    assert [driver.ids(n) for n in (1, 2, 3, 4)] == [expected] * 4
    assert driver.last(4).cached_tokens == 299


def test_the_pool_holds_short_rows_where_long_ones_had_been(plain, bucketed, engine):
    """Slots are as long as what runs needs, within one allocation that never moves."""
    loaded = dataclasses.replace(bucketed, context_length=1100)
    cache_bytes = 2048 * engine.runner.cache.token_bytes
    driver = Driver(Engine(loaded, 8, limits=Limits(cache_bytes)))
    cache = driver.engine.runner.cache
    version = cache.plan.version
    driver.add(0, text_prompt(600), SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
    driver.drain()
    assert (cache.plan.rows, cache.plan.capacity) == (2, 1024)
    lengths = [250, 5, 255, 30, 9, 12, 200, 31]
    sampling = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    for handle, length in enumerate(lengths, 1):
        driver.add(handle, text_prompt(length), sampling)
        driver.step()
    driver.drain()
    for handle, length in enumerate(lengths, 1):
        prompt = text_prompt(length)
        known = oracle(plain, prompt, 5)  # which may end earlier
        assert driver.ids(handle)[: len(known)] == known
    assert cache.plan.version == version


def filled(rows_and_tokens):
    """A pool whose rows hold their numbers."""
    cache = PooledCache(2, 16, 4096)
    rows, tokens = rows_and_tokens
    states = torch.zeros(1, 2, 1, 4)
    for layer in cache.layers:
        layer.lazy_initialization(states, states)
    cache.reserve(rows, tokens)
    for row in range(rows):
        cache.copy_in(row, [(torch.full((2, tokens, 4), 1.0 + row),) * 2] * 2, tokens)
    return cache


@pytest.mark.parametrize("wanted", [(2, 900), (7, 200), (3, 300), (1, 2000)])
def test_sharing_the_pool_out_anew_keeps_the_rows(wanted):
    """What is stored in both the old and the new slots is the same before and after."""
    cache = filled((3, 256))
    cache.max_tokens = 2048
    cache.reserve(*wanted)
    plan = cache.plan
    assert plan.rows >= wanted[0]
    assert plan.capacity >= wanted[1]
    for row in range(min(3, plan.rows)):
        for keys, values in cache.copy_out(row, 200):
            assert bool((keys == 1.0 + row).all())
            assert bool((values == 1.0 + row).all())


def test_more_rows_of_the_same_size_copy_nothing(monkeypatch):
    """Their slots stay where they are."""
    cache = filled((3, 256))
    monkeypatch.delattr("worker.engine.token_pool.PoolLayer.shift")
    cache.reserve(7, 200)
    assert cache.plan.rows >= 7
    assert all(bool((keys == 3.0).all()) for keys, _ in cache.copy_out(2, 256))


def test_a_pool_that_finds_no_memory_is_as_before(monkeypatch):
    """A layer that cannot grow leaves all layers, and the plan, as they were."""
    from worker.engine import token_pool

    cache = filled((3, 256))
    before, grown, left = vars(cache.plan).copy(), token_pool._grown, iter(range(3))

    def out_of_memory(*args):
        if next(left, None) is None:
            raise torch.OutOfMemoryError
        return grown(*args)

    monkeypatch.setattr(token_pool, "_grown", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        cache.reserve(9, 1000)
    assert vars(cache.plan) == before
    assert {pool.shape[0] for layer in cache.layers for pool in (layer.keys, layer.values)} == {
        cache.plan.tokens
    }
    assert all(bool((keys == 2.0).all()) for keys, _ in cache.copy_out(1, 256))


def test_steps_that_fail_give_way_to_plain_ones(plain, caplog):
    """A model whose decoder cannot be run by itself is served all the same, and the log says so."""
    options = BucketOptions("nothing of that name", compile=True)
    with caplog.at_level(logging.WARNING, "unbroken.engine"):
        runner, _ = build_runner(dataclasses.replace(plain, bucketed=options), 2, Limits())
    assert runner.bucketed is None
    assert caplog.text.count("trying others") == 2  # compiled and not
    decoded(runner, [text_prompt(9)], 1)


@pytest.mark.parametrize(
    ("made", "tried"),
    [("cr", ["cr", "r", "c"]), ("c", ["c", ""]), ("r", ["r", ""]), ("", [""])],
)
def test_without_a_compiler_or_recording_is_tried_before_plain_steps(made, tried):
    """Steps that are compiled (c) and recorded (r) give way to such that are one of both."""
    options = BucketOptions(compile="c" in made, capture="r" in made)
    choices = runner_setup._choices(options)
    assert ["c" * o.compile + "r" * o.capture for o in choices] == tried


def test_steps_that_find_no_memory_take_a_smaller_cache(plain, monkeypatch):
    """They stay as they are, before others are tried; the cache is a fifth smaller each time."""
    most = []
    warm_up = ModelRunner.warm_up

    def short(runner):
        most.append(runner.cache.max_tokens)
        if len(most) < 3:
            raise torch.OutOfMemoryError
        warm_up(runner)

    monkeypatch.setattr(ModelRunner, "warm_up", short)
    loaded = dataclasses.replace(plain, bucketed=BucketOptions())
    runner, _ = build_runner(loaded, 2, Limits(cache_bytes=2**23))
    assert runner.bucketed is not None
    assert [round(m / most[0], 1) for m in most] == [1.0, 0.8, 0.6]


def test_the_fingerprint_names_what_exact_steps_round_by(plain):
    """Other sizes, and plain steps, may round otherwise: a log of theirs is not continued."""
    prints = set()
    for options, rows in ((None, 2), (BucketOptions(), 2), (BucketOptions(), 4)):
        asked = dataclasses.replace(plain, bucketed=options)
        loaded = build_runner(asked, rows, Limits())[1]
        assert loaded.fingerprint.startswith(plain.fingerprint)
        prints.add(loaded.fingerprint)
    assert len(prints) == 3
    inexact = dataclasses.replace(asked, exact=False)
    assert build_runner(inexact, 2, Limits())[1].fingerprint == plain.fingerprint


def test_a_cpu_has_plain_steps(plain):
    """Nothing is gained by fixed shapes where a launch costs nothing."""
    assert best_options(plain.model, exact=True) is None
    assert plain.bucketed is None


@pytest.mark.parametrize("setting", ["auto", "0"])
def test_a_setting_turns_them_off(folder, monkeypatch, setting):
    """With CUDA_GRAPHS=0 a model is decoded plainly wherever it is."""
    monkeypatch.setattr(loader, "best_options", lambda _, *, exact: BucketOptions(fixed=exact))
    settings = WorkerSettings(model_repo_id=str(folder), cuda_graphs=setting, context_length=LIMIT)
    loaded = load(engine_config(settings), lambda *_: None)
    assert loaded.bucketed == (BucketOptions(fixed=True) if setting == "auto" else None)
