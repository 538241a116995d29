"""The engine benchmark's models and prompts: the same for everybody that is measured."""

from __future__ import annotations

import base64
import io
import json
import random
import shutil
from pathlib import Path
from typing import Any

from PIL import Image

from worker.demo_model import SEED, ensure_demo_model

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / ".cache" / "bench"
PICTURE = (128, 96)  # pixels; 12 tokens in both models
WORDS = (ROOT / "README.md").read_text().split()

LARGE_TEXT = {
    "hidden_size": 768,
    "intermediate_size": 2304,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [12, 10, 10],
        "mrope_interleaved": True,
    },
}
LARGE_VISION = {
    "depth": 6,
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_heads": 6,
    "out_hidden_size": 768,
    "deepstack_visual_indexes": [1, 3],
}


def model_folder(name: str) -> Path:
    """Return the folder of `demo` or `large` (about 100M parameters); build it where it is missing.

    Both never end a text by themselves: `generation_config.json` names an end token that is next to
    never drawn. So every server generates as many tokens as it is asked for.
    """
    folder = MODELS / name
    stamp = folder / "built-from.txt"
    demo = ensure_demo_model(ROOT / "models" / "demo-fast")
    version = (demo / "unbroken-demo.txt").read_text()
    if stamp.exists() and stamp.read_text() == version:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(demo, folder)
    (folder / "unbroken-demo.txt").unlink()
    if name == "large":
        _build_large(folder)
    path = folder / "generation_config.json"
    settings = json.loads(path.read_text())
    settings["eos_token_id"] = _token(folder, "<|vision_pad|>")
    path.write_text(json.dumps(settings))
    stamp.write_text(version)
    return folder


def _token(folder: Path, text: str) -> int:
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    return next(int(token["id"]) for token in added if token["content"] == text)


def _build_large(folder: Path) -> None:
    """Replace the demo model's weights by larger random ones; the processor stays."""
    from worker.engine.torchvision_shim import prepare_torchvision

    prepare_torchvision()
    import torch
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    config = json.loads((folder / "config.json").read_text())
    config["text_config"].update(LARGE_TEXT)
    config["vision_config"].update(LARGE_VISION)
    torch.manual_seed(SEED)
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**config)).to(torch.float32)
    generation = (folder / "generation_config.json").read_text()
    model.save_pretrained(folder)
    (folder / "generation_config.json").write_text(generation)


def messages(workload: str, number: int) -> list[dict[str, Any]]:
    """Return the `number`-th conversation of a workload: `text`, `image`, or `mixed`.

    No two begin with the same words, so that nobody's prefix cache answers from memory. Lengths
    differ: 20 to 60 words.
    """
    draw = random.Random(number)
    text = " ".join([f"{number:05d}", *draw.choices(WORDS, k=draw.randint(20, 60))])
    if workload == "text" or (workload == "mixed" and number % 2):
        return [{"role": "user", "content": text}]
    picture = {"type": "image_url", "image_url": {"url": _picture(draw)}}
    return [{"role": "user", "content": [{"type": "text", "text": text}, picture]}]


def _picture(draw: random.Random) -> str:
    image = Image.new("RGB", PICTURE, tuple(draw.choices(range(256), k=3)))
    image.paste(tuple(draw.choices(range(256), k=3)), (20, 20, 90, 60))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
