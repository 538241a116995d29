"""The decode step as a record: the same bits as the forward it was made of, or none."""

from __future__ import annotations

import pytest
import torch

from tests.engine_kit import CONTEXT, GREEDY, Driver, config, image_prompt, oracle, text_prompt
from worker.engine.torchvision_shim import prepare_torchvision

prepare_torchvision()  # before anything imports transformers
# ruff: noqa: E402
import transformers

from worker.demo_model import ensure_demo_model
from worker.engine import decode_step
from worker.engine.engine import Engine
from worker.engine.loader import load
from worker.engine.model_runner import ModelRunner

pytestmark = pytest.mark.timeout(120)  # real models, on machines that may be busy

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = ensure_demo_model(tmp_path_factory.mktemp("models") / "demo")
    return load(config(folder), lambda _stage, _fraction: None)


def small(family: str, dtype=torch.float64, **settings) -> ModelRunner:
    made = getattr(transformers, f"{family}Config")(**SMALL, **settings)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(made).to(dtype).eval()
    runner = ModelRunner(model.requires_grad_(False), 8, 64)
    runner.verify()
    return runner


def test_a_recorded_step_gives_the_forwards_bits_for_any_batch(loaded):
    """Rows of pictures and text, one to eight of them, at other lengths than it was recorded at."""
    engine, plain = Engine(loaded, 8), Engine(loaded, 8)
    assert engine.runner.step.is_recorded
    plain.runner.step.forget()
    both = [Driver(engine), Driver(plain)]
    seen = []
    for number in range(8):
        prompt = image_prompt(loaded, number) if number % 2 else text_prompt(9 + 31 * number)
        for driver in both:
            driver.add(number, prompt)
            driver.engine.step(decode=False)  # where none waits for a token, it comes at once
            driver.step()
        rows = [list(d.engine.scheduler.running) for d in both]
        for row, other in zip(*rows, strict=True):
            assert row.output_ids == other.output_ids
        if not any(len(row.output_ids) >= GREEDY.max_tokens - 1 for row in rows[0]):
            logits = [d.engine.runner.decode(r) for d, r in zip(both, rows, strict=True)]
            assert torch.equal(*logits)
            seen.append(len(rows[0]))
            for row in (*rows[0], *rows[1]):
                row.length -= 1  # the step that follows writes the same once more
    assert seen[:8] == list(range(1, 9))


def test_a_recorded_step_gives_the_tokens_of_generate(loaded):
    """A picture and a text in one batch, to their ends."""
    driver = Driver(Engine(loaded, 8))
    prompts = [image_prompt(loaded, 3), text_prompt(40)]
    for handle, prompt in enumerate(prompts):
        driver.add(handle, prompt)
    rows = {}
    while not driver.engine.idle:
        driver.step()
        rows |= {row.handle: row for row in driver.engine.scheduler.running}
    expected = [oracle(loaded, prompt) for prompt in prompts]
    assert [row.output_ids for row in rows.values()] == expected


@pytest.mark.parametrize("family", ["Qwen3", "Llama", "Qwen2", "GPTNeoX"])
def test_other_families_are_recorded(family):
    """Nothing in the record is Qwen3-VL's."""
    assert small(family).step.is_recorded


def test_a_forward_that_looks_at_its_tokens_is_not_recorded():
    """Experts one by one, as the tokens choose them: a record would run the first batch's."""
    runner = small(
        "Mixtral", num_local_experts=8, num_experts_per_tok=1, experts_implementation="eager"
    )
    assert not runner.step.is_recorded


def test_a_mixture_that_runs_all_of_its_experts_at_once_is_recorded():
    """How Transformers runs it where nobody asks otherwise."""
    experts = {"num_local_experts": 8, "num_experts_per_tok": 1}
    assert small("Mixtral", torch.float32, **experts).step.is_recorded


def test_a_record_that_leaves_the_cache_as_it_was_is_dropped(monkeypatch):
    """The next step's logits would be wrong, not this one's."""
    update = decode_step._LentRows.update

    def forgetful(layer, *states, **options):
        layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
        return update(layer, *states, **options)

    monkeypatch.setattr(decode_step._LentRows, "update", forgetful)
    assert not small("Qwen3").step.is_recorded


def test_a_record_that_fails_later_gives_way_to_the_forward():
    """The same step is run by the forward, and so are those that follow."""
    runner = small("Qwen3")
    rows = torch.tensor([[5, 0, 0], [9, 0, 0]])
    with torch.inference_mode():
        runner.cache.reserve(2, 4)
        expected = runner.step(rows, 0, 0)

        def broken(*_inputs):
            raise RuntimeError("no longer")

        runner.step._record = broken
        assert torch.equal(runner.step(rows, 0, 0), expected)
    assert not runner.step.is_recorded


def test_a_record_that_lacks_memory_is_kept():
    """One that fails for that makes room, as the forward would."""
    runner = small("Qwen3")

    def narrow(*_inputs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    runner.step._record = narrow
    with torch.inference_mode():
        runner.cache.reserve(2, 4)
        with pytest.raises(RuntimeError, match="allocate"):
            runner.step(torch.tensor([[5, 0, 0]]), 0, 0)
    assert runner.step.is_recorded


def test_a_forward_that_looks_at_its_positions_is_not_recorded():
    """Dynamic rotary embeddings change far out, where no short example comes."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    runner = small("Llama", rope_parameters=rope, max_position_embeddings=32)
    assert not runner.step.is_recorded


def test_a_forward_that_cannot_be_recorded_runs_as_it_is(loaded, monkeypatch):
    """The engine starts, and answers with the same tokens."""

    def broken(*_args, **_options):
        raise RuntimeError("no records here")

    monkeypatch.setattr(torch.jit, "trace", broken)
    driver = Driver(Engine(loaded, 2))
    assert not driver.engine.runner.step.is_recorded
    driver.add(1, text_prompt(CONTEXT // 4))
    driver.step()
    (row,) = driver.engine.scheduler.running
    driver.drain()
    assert row.output_ids == oracle(loaded, text_prompt(CONTEXT // 4))
