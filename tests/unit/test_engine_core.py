from __future__ import annotations

import dataclasses

import msgspec
import numpy as np
import pytest
import torch

from shared.protocol import SamplingParams
from tests.engine_kit import (
    CONTEXT,
    GREEDY,
    Driver,
    alone,
    config,
    image_prompt,
    oracle,
    text_prompt,
)
from worker.demo_model import ensure_demo_model
from worker.engine.torchvision_shim import prepare_torchvision

prepare_torchvision()  # before anything imports transformers
# ruff: noqa: E402

from worker.engine.engine import Engine
from worker.engine.loader import LoadError, load
from worker.engine.messages import Abort, Add, Cancel, Prompt
from worker.engine.model_runner import ModelRunner, UnsupportedModelError
from worker.engine.scheduler import Scheduler
from worker.engine.sequence import Chunk, Sequence

pytestmark = pytest.mark.timeout(120)  # real models, on machines that may be busy


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return ensure_demo_model(tmp_path_factory.mktemp("models") / "demo")


@pytest.fixture(scope="session")
def loaded(folder):
    return load(config(folder), lambda _stage, _fraction: None)


@pytest.fixture
def engine(loaded):
    return Engine(loaded, 8)


@pytest.fixture
def driver(engine):
    return Driver(engine)


def test_sequences_that_join_and_leave_give_the_tokens_of_generate(loaded, driver):
    """Eight prompts, text and image, that join and leave at different steps equal `generate()`."""
    prompts = [
        image_prompt(loaded, seed=n, side=(4, 6, 8)[n % 3])
        if n % 3 == 1
        else text_prompt(3 + 9 * n)
        for n in range(8)
    ]
    lengths = [20, 3, 11, 30, 7, 1, 16, 25]
    for handle, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        driver.add(handle, prompt, SamplingParams(temperature=0, max_tokens=length))
        for _ in range(handle % 3):
            driver.step()
    driver.drain()
    for handle, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        expected = oracle(loaded, prompt, length)
        assert driver.ids(handle) == expected
        assert driver.last(handle).completion_tokens == len(expected)


def test_every_running_sequence_gets_one_token_per_step(driver):
    """A step gives each running sequence exactly one token, whoever joins in it."""
    counts = []
    for handle in range(3):
        driver.add(handle, text_prompt(5, handle), SamplingParams(temperature=0, ignore_eos=True))
        driver.step()
        counts.append([len(s.output_ids) for s in driver.engine.scheduler.running])
    assert counts == [[1], [2, 1], [3, 2, 1]]


def test_a_seeded_draw_does_not_depend_on_the_batch(loaded, driver):
    """A sampled sequence draws the same tokens alone and among others."""
    sampling = [
        SamplingParams(temperature=1.2, top_p=0.95, top_k=50, seed=100 + n, max_tokens=24)
        for n in range(6)
    ]
    for handle, params in enumerate(sampling):
        driver.add(handle, text_prompt(4 + handle), params)
        driver.step()
    driver.drain()
    for handle, params in enumerate(sampling):
        assert driver.ids(handle) == alone(loaded, text_prompt(4 + handle), params)


@pytest.mark.parametrize("kind", ["text", "image"])
def test_a_sequence_continues_from_any_seam_as_if_nothing_had_happened(loaded, kind):
    """Prompt plus the first n tokens give the rest of the undisturbed run, for every n."""
    prompt = text_prompt(9) if kind == "text" else image_prompt(loaded, seed=4)
    sampling = SamplingParams(temperature=1.0, seed=7, max_tokens=12, ignore_eos=True)
    whole = alone(loaded, prompt, sampling)
    driver = Driver(Engine(loaded, 8))
    for seam in range(len(whole) + 1):
        driver.add(seam, prompt, sampling, whole[:seam])
    driver.drain()
    for seam in range(len(whole) + 1):
        assert whole[:seam] + driver.ids(seam) == whole
        assert driver.last(seam).completion_tokens == len(whole)
        assert driver.last(seam).finish == "length"


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(
            temperature=1.5,
            seed=2,
            frequency_penalty=0.8,
            presence_penalty=0.5,
            top_p=0.9,
            min_p=0.01,
        ),
        SamplingParams(temperature=0, repetition_penalty=1.6, logit_bias={7: 2.0}, min_tokens=5),
    ],
)
def test_text_goes_on_over_any_seam_of_the_log(loaded, sampling):
    """Penalties, filters, and stop strings that lie across the seam: the same text and the end."""
    plain = msgspec.structs.replace(sampling, max_tokens=16, ignore_eos=True)
    driver = Driver(Engine(loaded, 1))
    driver.add(1, text_prompt(9), plain)
    words = driver.drain().text(1)
    stop = words[len(words) // 2 : len(words) // 2 + 4]  # in the middle, over several tokens
    stopped = msgspec.structs.replace(plain, stop=(stop,))
    for params in (plain, stopped):
        driver = Driver(Engine(loaded, 8))
        driver.add(0, text_prompt(9), params)
        pieces = [piece for o in driver.drain().said[0] for piece in o.pieces]
        whole, end = driver.text(0), driver.last(0)
        for seam in range(0, len(pieces), 4):
            known = [i for piece in pieces[:seam] for i in piece.ids]
            driver.add(seam + 1, text_prompt(9), params, known)
        driver.drain()
        for seam in range(0, len(pieces), 4):
            head = "".join(piece.text for piece in pieces[:seam])
            assert head + driver.text(seam + 1) == whole
            last = driver.last(seam + 1)
            assert (last.finish, last.completion_tokens) == (end.finish, end.completion_tokens)


def test_a_generated_placeholder_token_survives_continuation(loaded, driver):
    """An image token the model itself drew is no picture when the sequence is continued."""
    prompt = image_prompt(loaded)
    place = loaded.model.config.image_token_id
    sampling = SamplingParams(temperature=0, max_tokens=6, logit_bias={place: 100.0})
    driver.add(1, prompt, sampling)
    driver.add(2, prompt, sampling, [place] * 3)
    driver.drain()
    assert driver.ids(1) == [place] * 6
    assert driver.ids(2) == [place] * 3


def test_continued_positions_equal_undisturbed_ones(loaded):
    """After an image, continued logits equal the undisturbed run's, so its positions do too."""
    prompt = image_prompt(loaded, seed=3, side=8)
    runner = ModelRunner(loaded.model, 2, CONTEXT)
    whole, seamed = (
        Sequence(n, prompt, GREEDY, frozenset(), CONTEXT, () if n == 0 else (5, 6, 7))
        for n in range(2)
    )
    whole.slot, seamed.slot = 0, 1
    runner.reserve([whole, seamed])
    runner.prefill([Chunk(whole, whole.total)])
    for token in (5, 6, 7):
        whole.output_ids.append(token)
        runner.reserve([whole, seamed])
        expected = runner.decode([whole])[0]
    runner.prefill([Chunk(seamed, len(prompt.input_ids))])
    continued = runner.prefill([Chunk(seamed, 3)])[0]
    assert whole.rope_delta == seamed.rope_delta != 0
    assert whole.length == seamed.length == len(prompt.input_ids) + 3
    torch.testing.assert_close(continued, expected, rtol=1e-9, atol=1e-9)


def test_a_reused_row_attends_to_nothing_stale(loaded, driver):
    """Whatever a row's former tenants left behind does not change its next tenant's tokens."""
    driver.add(1, text_prompt(200), SamplingParams(temperature=0, max_tokens=2))
    driver.add(2, text_prompt(5), SamplingParams(temperature=0, max_tokens=60, ignore_eos=True))
    for _ in range(4):
        driver.step()
    with torch.inference_mode():
        for layer in driver.engine.runner.cache.layers:
            for stored in (layer.keys, layer.values):
                stored[1:] = stored[0, :, 20:] = 1e4
    driver.add(3, text_prompt(12))
    driver.drain()
    assert driver.ids(3) == oracle(loaded, text_prompt(12))
    long = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    assert driver.ids(2) == alone(loaded, text_prompt(5), long)


def test_the_cache_grows_with_use(loaded, driver):
    """Rows and tokens per row double as needed, and never pass the batch and context bounds."""
    plan = driver.engine.runner.cache.plan
    assert (plan.rows, plan.capacity) == (0, 0)  # the start-up check's are given back
    driver.add(1, text_prompt(250), SamplingParams(temperature=0, max_tokens=40, ignore_eos=True))
    driver.add(2, text_prompt(9))
    driver.add(3, text_prompt(8))
    driver.drain()
    assert (plan.rows, plan.capacity) == (4, CONTEXT)
    long = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    assert driver.ids(1) == alone(loaded, text_prompt(250), long)
    assert driver.ids(2) == oracle(loaded, text_prompt(9))


def test_bad_tensors_fail_their_own_sequence_only(loaded, driver):
    """A prefill that raises answers `generation_failed`; the others go on unchanged."""
    bad = image_prompt(loaded)
    bad = dataclasses.replace(bad, tensors={**bad.tensors, "image_grid_thw": np.array([[1, 2, 2]])})
    driver.add(1, text_prompt(6))
    driver.step()
    driver.add(2, bad)
    driver.add(3, text_prompt(11))
    driver.drain()
    code, message = driver.last(2).error
    assert code == "generation_failed"
    assert "Traceback" not in message
    assert driver.ids(1) == oracle(loaded, text_prompt(6))
    assert driver.ids(3) == oracle(loaded, text_prompt(11))


def test_token_ids_outside_the_vocabulary_fail_their_own_sequence(driver):
    """Ids the embedding does not have are refused before they reach the device."""
    driver.add(1, Prompt([5, 10**6]))
    driver.add(2, Prompt([5, -1]))
    driver.add(3, Prompt([]))
    assert driver.drain().engine.idle
    assert [driver.last(n).error[0] for n in (1, 2, 3)] == ["generation_failed"] * 3


def test_numbers_that_are_not_finite_fail_their_own_sequence(loaded, driver):
    """A row of NaNs ends with an error and leaves nothing to the next tenant of its row."""
    bad = image_prompt(loaded)
    broken = np.full_like(bad.tensors["pixel_values"], np.nan)
    bad = dataclasses.replace(bad, tensors={**bad.tensors, "pixel_values": broken})
    driver.add(1, bad)
    driver.add(3, text_prompt(7))  # its row; the longer one beside it makes the window reach back
    driver.add(2, text_prompt(30), SamplingParams(temperature=0.9, seed=3, max_tokens=20))
    driver.drain()
    assert driver.last(1).error[0] == "generation_failed"
    sampled = SamplingParams(temperature=0.9, seed=3, max_tokens=20)
    assert driver.ids(2) == alone(loaded, text_prompt(30), sampled)
    assert driver.ids(3) == oracle(loaded, text_prompt(7))


def test_a_sequence_without_memory_fails_and_the_others_go_on(loaded, driver, monkeypatch):
    """Where a step finds no room, the newest waits for the others, and one that is alone fails."""
    reserve = driver.engine.runner.reserve

    def narrow(rows):
        if max(s.length for s in rows) > 40:
            raise torch.OutOfMemoryError
        reserve(rows)

    monkeypatch.setattr(driver.engine.runner, "reserve", narrow)
    driver.add(1, text_prompt(38), SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
    driver.add(2, text_prompt(6))
    driver.drain()
    assert "memory" in driver.last(1).error[1]
    assert driver.ids(2) == oracle(loaded, text_prompt(6))


def test_an_over_long_prompt_is_told_both_numbers(driver):
    """A prompt that leaves no room for a token names the limit and its own length."""
    driver.add(1, text_prompt(CONTEXT))
    driver.drain()
    assert driver.last(1).error == (
        "context_length_exceeded",
        f"This model's maximum context length is {CONTEXT} tokens, but the prompt has {CONTEXT}.",
    )


def test_generation_ends_with_length_where_the_context_ends(driver):
    """`max_tokens` beyond the context is no error: the answer stops there with "length"."""
    driver.add(
        1, text_prompt(CONTEXT - 5), SamplingParams(temperature=0, max_tokens=99, ignore_eos=True)
    )
    driver.drain()
    assert driver.last(1).finish == "length"
    assert driver.last(1).completion_tokens == 5
    assert len(driver.ids(1)) == 5


def test_cancel_ends_a_running_and_a_waiting_sequence_with_an_answer(loaded):
    """Both end as "stop" with the reason; the waiting one without a token."""
    driver = Driver(Engine(loaded, 1))
    endless = SamplingParams(temperature=0, max_tokens=300, ignore_eos=True)
    driver.add(1, text_prompt(5), endless)
    driver.add(2, text_prompt(6), endless)
    driver.step()
    driver.step()
    driver.engine.handle(Cancel(1, "requested"))
    driver.engine.handle(Cancel(2, "abandoned"))
    driver.engine.handle(Cancel(99, "requested"))
    driver.step()
    assert driver.engine.idle
    assert (driver.last(1).finish, driver.last(1).cancelled) == ("stop", "requested")
    assert (driver.last(2).finish, driver.last(2).cancelled) == ("stop", "abandoned")
    assert driver.last(1).completion_tokens == 3
    assert driver.ids(2) == []
    assert driver.engine.cancelled == {}


def test_abort_is_silent_and_leaves_the_others_alone(loaded, driver):
    """Aborted sequences, waiting or running, say nothing more; a moved row goes on unchanged."""
    for handle in range(4):
        driver.add(handle, text_prompt(6 + handle))
    for _ in range(3):
        driver.step()
    driver.said.clear()
    before = len(driver.engine.scheduler.running[1].output_ids)
    driver.engine.handle(Abort(0))
    driver.engine.handle(Abort(3))
    driver.drain()
    assert sorted(driver.said) == [1, 2]
    assert driver.ids(1)[-5:] == oracle(loaded, text_prompt(7))[-5:]
    assert driver.last(1).completion_tokens == len(oracle(loaded, text_prompt(7))) > before
    assert driver.last(2).completion_tokens == len(oracle(loaded, text_prompt(8)))


def test_a_continued_sequence_that_had_ended_only_says_so(loaded, driver):
    """All tokens in the log and no end: the successor ends it without drawing another."""
    whole = alone(loaded, text_prompt(9))
    driver.add(1, text_prompt(9), GREEDY, whole)
    driver.step()
    assert driver.engine.idle
    assert driver.last(1).finish == ("length" if len(whole) == GREEDY.max_tokens else "stop")
    assert driver.ids(1) == []


def test_the_scheduler_admits_in_order_and_keeps_rows_dense():
    """First come, first served; when one leaves, the last one's row fills the hole."""
    scheduler = Scheduler(3)
    made = [Sequence(n, Prompt([1]), GREEDY, frozenset(), 10) for n in range(5)]
    for sequence in made:
        scheduler.add(sequence)
    assert [scheduler.admit() for _ in range(4)] == [*made[:3], None]
    for _ in range(3):
        scheduler.join()
    assert scheduler.remove(made[4]) == []
    assert scheduler.remove(made[0]) == [(2, made[2])]
    assert [(s.handle, s.slot) for s in scheduler.running] == [(2, 0), (1, 1)]
    assert scheduler.admit() is made[3]
    assert made[3].slot == 2
    assert scheduler.find(0) is None
    assert scheduler.find(1) is made[1]


def test_a_sliding_window_model_is_refused(loaded):
    """Layers other than plain full attention are an error, not wrong tokens."""
    from transformers import MistralConfig, MistralForCausalLM

    tiny = MistralForCausalLM(
        MistralConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            sliding_window=16,
        )
    ).eval()
    with pytest.raises(UnsupportedModelError, match="not supported yet"):
        ModelRunner(tiny, 2, 64)
    with pytest.raises(LoadError, match="not supported yet"):
        Engine(dataclasses.replace(loaded, model=tiny), 2)


def test_a_model_that_ignores_our_positions_is_refused():
    """The start-up check finds a forward that a batched decode step does not reproduce."""
    from transformers import BloomConfig, BloomForCausalLM

    tiny = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=2)).eval()
    with pytest.raises(UnsupportedModelError):
        ModelRunner(tiny, 2, 64).verify()


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("Qwen3", {"head_dim": 16}),
        ("Llama", {}),
        ("Qwen2", {}),
        ("GPTNeoX", {}),
    ],
)
def test_text_models_of_other_families_pass_the_start_up_check(family, settings):
    """The slot cache needs nothing of Qwen3-VL's."""
    import transformers

    made = getattr(transformers, f"{family}Config")(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        **settings,
    )
    model = getattr(transformers, f"{family}ForCausalLM")(made).double().eval()
    ModelRunner(model, 4, 64).verify()


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("/nowhere/secret/demo", "There is no model folder named 'demo'."),
        ("somebody/nothing", "The Hugging Face hub cannot be reached"),
        ("not a repo id!", "neither a model folder nor a hub repository id"),
    ],
)
def test_a_model_that_is_not_there_is_one_clear_sentence(model, reason, monkeypatch):
    """Missing folder, unreachable hub and malformed id each say so, without a path."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(LoadError) as failure:
        load(config(model), lambda _stage, _fraction: None)
    assert reason in str(failure.value)
    assert "secret" not in str(failure.value)


def test_a_broken_folder_is_one_clear_sentence(folder, tmp_path):
    """No config, a config of nonsense, weights cut short, too big a model: one sentence each."""
    import shutil

    def failure(place, **changes):
        with pytest.raises(LoadError) as caught:
            load(config(place, **changes), lambda _stage, _fraction: None)
        assert str(tmp_path) not in str(caught.value)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    (tmp_path / "empty").mkdir()
    assert failure(tmp_path / "empty") == "The model folder 'empty' has no config.json."
    broken = shutil.copytree(folder, tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert failure(broken).startswith("'broken' cannot be loaded (")
    (broken / "config.json").write_text("{")
    assert failure(broken).startswith("'broken' cannot be loaded (")
    assert failure(folder, dtype="int8").startswith("TORCH_DTYPE must be")


def test_a_model_larger_than_the_memory_is_refused(folder, monkeypatch):
    """The numbers are in the sentence; the kernel does not get to kill the process."""
    from worker.engine import loader

    monkeypatch.setattr(loader, "MEMORY_HEADROOM", 1e9)
    with pytest.raises(LoadError, match=r"Not enough memory .* GiB are available"):
        load(config(folder), lambda _stage, _fraction: None)


def test_half_precision_is_widened_on_a_cpu(folder, tmp_path):
    """`auto` turns a bfloat16 checkpoint into float32 without a GPU; asked for, it stays."""
    import shutil

    from transformers import AutoModelForImageTextToText

    half = shutil.copytree(folder, tmp_path / "half")
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(half)
    assert load(config(half, dtype="auto"), lambda *_: None).dtype == "float32"
    kept = load(config(half, dtype="bfloat16"), lambda *_: None)
    assert kept.dtype == "bfloat16"
    driver = Driver(Engine(kept, 2))
    driver.add(1, text_prompt(5))
    assert driver.drain().last(1).completion_tokens > 0


def test_the_fingerprint_names_what_rounding_depends_on(folder, loaded):
    """Equal for equal loads; different for another dtype."""
    again = load(config(folder), lambda *_: None)
    assert again.fingerprint == loaded.fingerprint
    assert "float64" in loaded.fingerprint
    assert torch.__version__ in loaded.fingerprint
    other = load(config(folder, dtype="float32"), lambda *_: None)
    assert other.fingerprint != loaded.fingerprint


def explode_for(driver, monkeypatch, handle, error, after=0):
    """Make each decode step with this sequence in it raise, once it has `after` tokens."""
    decode, calls = driver.engine.runner.decode, []

    def broken(rows):
        calls.append([s.handle for s in rows])
        if any(s.handle == handle and len(s.output_ids) > after for s in rows):
            raise error
        return decode(rows)

    monkeypatch.setattr(driver.engine.runner, "decode", broken)
    return calls


def test_a_step_that_raises_fails_the_sequence_that_caused_it(loaded, driver, monkeypatch):
    """The batch is tried row by row: the culprit fails, the others have all their tokens."""
    explode_for(driver, monkeypatch, 2, RuntimeError("shape"), after=3)
    for handle in (1, 2, 3):
        driver.add(handle, text_prompt(5 + handle))
    driver.drain()
    assert driver.last(2).error[0] == "generation_failed"
    assert "shape" not in driver.last(2).error[1]
    for handle in (1, 3):
        assert driver.ids(handle) == oracle(loaded, text_prompt(5 + handle))


def test_a_lack_of_memory_makes_the_newest_wait(loaded, driver, monkeypatch):
    """Steps that need too much memory end nothing: the newest goes on when others have left."""
    decode, sizes = driver.engine.runner.decode, []

    def narrow(rows):
        if len(rows) > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")
        sizes.append(len(rows))
        return decode(rows)

    monkeypatch.setattr(driver.engine.runner, "decode", narrow)
    sampled = SamplingParams(temperature=1.0, seed=3, max_tokens=12, ignore_eos=True)
    for handle in range(5):
        driver.add(handle, text_prompt(6 + handle), sampled)
        driver.step()
    driver.drain()
    for handle in range(5):
        assert driver.ids(handle) == alone(loaded, text_prompt(6 + handle), sampled)
    assert max(sizes) == 2
    assert driver.engine.scheduler.running == []


def test_a_prefill_without_memory_waits_until_another_has_left(loaded, driver, monkeypatch):
    """A prompt that finds no room beside the others is prefilled when one of them has ended."""
    prefill, tries = driver.engine.runner.prefill, []

    def narrow(chunks):
        tries.append([chunk.sequence.handle for chunk in chunks])
        if len(driver.engine.scheduler.live) > 1:
            raise torch.OutOfMemoryError
        return prefill(chunks)

    monkeypatch.setattr(driver.engine.runner, "prefill", narrow)
    driver.add(1, text_prompt(6))
    driver.add(2, text_prompt(7))
    driver.drain()
    assert tries == [[1, 2], [1], [1], [2]]
    assert driver.ids(2) == oracle(loaded, text_prompt(7))


def test_a_sequence_on_trial_has_its_first_step_alone(loaded, driver, monkeypatch):
    """Whatever may have killed an engine is prefilled and decoded once without the others."""
    calls, busy = explode_for(driver, monkeypatch, -1, None), []
    monkeypatch.setattr(driver.engine, "_on_busy", busy.append)
    driver.add(1, text_prompt(6))
    driver.step()
    driver.step()
    driver.engine.handle(Add(2, text_prompt(7), GREEDY, (), trial=True))
    del calls[:], busy[:]
    driver.step()
    assert (calls, busy) == ([], [(2,), ()])
    driver.step()
    assert (calls, busy[2:]) == ([[2]], [(2,), ()])
    driver.step()
    assert calls[1:] == [[1, 2]]
    driver.drain()
    for handle in (1, 2):
        assert driver.ids(handle) == oracle(loaded, text_prompt(5 + handle))


@pytest.fixture(scope="session")
def half(folder):
    """The demo model in bfloat16, exact."""
    return load(config(folder, dtype="bfloat16"), lambda *_: None)


def test_a_half_precision_sequence_is_continued_exactly(half):
    """In bfloat16 the logged tokens go through the decode step again, beside running ones."""
    assert (half.exact, half.replay) == (True, True)
    prompts = [text_prompt(9), image_prompt(half, seed=4), text_prompt(60)]
    for number, prompt in enumerate(prompts):
        sampling = SamplingParams(temperature=1.0, seed=number, max_tokens=24, ignore_eos=True)
        whole = alone(half, prompt, sampling)
        driver = Driver(Engine(half, 8))
        seams = (0, 1, 13, 24)
        for seam in seams:
            driver.add(seam, prompt, sampling, whole[:seam])
            driver.step()
        driver.drain()
        for seam in seams:
            assert whole[:seam] + driver.ids(seam) == whole


def test_exactness_is_a_choice_in_half_precision(folder):
    """`EXACT=0` continues bfloat16 by a prefill, and says so; float64 needs no replay."""
    quick = load(config(folder, dtype="bfloat16", exact=False), lambda *_: None)
    assert (quick.exact, quick.replay) == (False, False)
    wide = load(config(folder, exact=False), lambda *_: None)
    assert (wide.exact, wide.replay) == (True, False)
