"""The demo model: real classes, the same bytes each time, built once and replaced at once."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from worker import demo_model as recipe
from worker.demo_corpus import LAST_NUMBER
from worker.demo_model import (
    ORDINARY_TOKENS,
    SPECIAL_TOKENS,
    STAMP,
    ensure_demo_model,
)

pytestmark = pytest.mark.timeout(120)  # importing torch takes long on a busy machine

ROOT = Path(__file__).parents[2]


def hashes(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


@pytest.fixture(scope="module")
def parts(demo_model):
    """Tokenizer, processor and model, loaded as any model is."""
    from worker.engine.torchvision_shim import prepare_torchvision

    prepare_torchvision()
    from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    return (
        AutoTokenizer.from_pretrained(demo_model),
        AutoProcessor.from_pretrained(demo_model),
        AutoModelForImageTextToText.from_pretrained(demo_model),
    )


def test_importing_the_module_loads_no_torch():
    """The module itself can be imported where torch must not be."""
    code = "import sys, worker.demo_model; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert out.stdout.strip() == "False", out.stderr


def test_the_build_is_deterministic(demo_model, tmp_path):
    """The program builds the same files in another process, and leaves nothing else behind."""
    folder = tmp_path / "again"
    command = [sys.executable, "-m", "worker.demo_model", "--fast", str(folder)]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert str(folder) in out.stdout, out.stderr
    assert hashes(folder) == hashes(demo_model)
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_a_current_model_is_left_alone(demo_model, monkeypatch):
    """A folder with the current stamp is not built again."""
    monkeypatch.setattr(recipe, "_build", fail)
    assert ensure_demo_model(demo_model) == demo_model


def test_a_changed_recipe_replaces_the_model(tmp_path, monkeypatch):
    """A folder with another stamp is replaced as a whole."""
    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / STAMP).write_text("an older recipe")
    (folder / "left over").write_text("x")
    monkeypatch.setattr(recipe, "_build", build_stamp_only)
    ensure_demo_model(folder)
    assert [path.name for path in folder.iterdir()] == [STAMP]
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_a_failed_build_leaves_the_old_model(tmp_path, monkeypatch):
    """The old model stays in place until the new one is complete."""
    (tmp_path / STAMP).write_text("an older recipe")
    monkeypatch.setattr(recipe, "_build", fail)
    with pytest.raises(RuntimeError):
        ensure_demo_model(tmp_path)
    assert (tmp_path / STAMP).read_text() == "an older recipe"


def test_somebody_elses_folder_is_not_replaced(tmp_path):
    """A folder that holds something else is refused, and kept."""
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(FileExistsError):
        ensure_demo_model(tmp_path)
    assert (tmp_path / "thesis.txt").exists()


def test_the_tokenizer_is_qwens_in_small(parts):
    """Special tokens are one id each, the thinking tags survive decoding, any text round-trips."""
    tokenizer, _, model = parts
    for token in SPECIAL_TOKENS + ORDINARY_TOKENS:
        assert len(tokenizer.encode(token)) == 1
    for number in range(LAST_NUMBER + 1):
        assert len(tokenizer.encode(str(number))) == 1
    assert len(tokenizer.encode("1, 2, 300")) == 5
    assert len(tokenizer) == model.get_input_embeddings().num_embeddings
    ids = tokenizer.encode("<think>x</think>Zoë 日本 🌊\n\t42<|im_end|>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>x</think>Zoë 日本 🌊\n\t42"


def test_the_template_covers_all_roles(parts):
    """System, user, assistant and tool turns are framed, and a thought is opened at the end."""
    _, processor, _ = parts
    call = {"function": {"name": "look", "arguments": {"at": "sea"}}}
    conversation = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "Let me look.", "tool_calls": [call]},
        {"role": "tool", "content": "waves"},
        {"role": "tool", "content": "a boat"},
        {"role": "user", "content": [{"type": "video"}]},
    ]
    text = processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What?<|im_end|>\n"
        "<|im_start|>assistant\nLet me look.\n<tool_call>\n"
        '{"name": "look", "arguments": {"at": "sea"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\nwaves\n</tool_response>"
        "\n<tool_response>\na boat\n</tool_response><|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|><|im_end|>\n"
        "<|im_start|>assistant\n<think>\n"
    )


def test_greedy_text_is_lively(parts):
    """Greedy text differs between prompts and does not repeat one token; some of it ends."""
    tokenizer, _, model = parts
    texts = [
        generate(tokenizer, model, question)
        for question in ("Hello", "What is this?", "Why?", "Count to ten please")
    ]
    assert len({tuple(ids[:4]) for ids in texts}) == len(texts)
    assert sum(len(set(ids)) for ids in texts) > 0.4 * sum(map(len, texts))
    assert any(ids[-1] == tokenizer.eos_token_id for ids in texts)
    pads = {tokenizer.convert_tokens_to_ids(t) for t in SPECIAL_TOKENS if "vision" in t}
    assert pads.isdisjoint(set().union(*texts))


def generate(tokenizer, model, question):
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    output = model.generate(**inputs, max_new_tokens=60, do_sample=False)
    return output[0, inputs["input_ids"].shape[1] :].tolist()


def build_stamp_only(folder, kind):
    folder.mkdir()
    (folder / STAMP).write_text(recipe.recipe_version(kind))


def fail(folder, kind):
    raise RuntimeError("built")
