"""The GPU benchmark's models and prompts: Qwen3-VL-2B's shape with random weights, or a tiny one.

Nothing is downloaded, and no file is read: weights are drawn on the device, prompts are ids.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from worker.engine.bucketed import BucketOptions
from worker.engine.loader import LoadedModel
from worker.engine.messages import Prompt

Config = dict[str, Any]

# As in the configuration that Qwen publishes with Qwen3-VL-2B-Thinking.
QWEN_TEXT: Config = {
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 262_144,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 5e6,
        "mrope_section": [24, 20, 20],
        "mrope_interleaved": True,
    },
}
QWEN_VISION: Config = {
    "depth": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_heads": 16,
    "out_hidden_size": 2048,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [5, 11, 17],
}
QWEN_IDS = {
    "image_token_id": 151_655,
    "video_token_id": 151_656,
    "vision_start_token_id": 151_652,
    "vision_end_token_id": 151_653,
}
TINY_TEXT: Config = {
    **QWEN_TEXT,
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rope_parameters": {**QWEN_TEXT["rope_parameters"], "mrope_section": [6, 5, 5]},
}
TINY_VISION: Config = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 4,
    "out_hidden_size": 128,
    "num_position_embeddings": 256,
    "deepstack_visual_indexes": [0, 1],
}
TINY_IDS = {name: 1020 + n for n, name in enumerate(QWEN_IDS)}
PATCH, MERGE, FRAMES_PER_PATCH, CHANNELS = 16, 2, 2, 3
SAMPLE_RANGE = (300, 1000)  # ids of prompts: ordinary tokens of both vocabularies


@dataclass(frozen=True)
class Scale:
    """How large everything is; one for a GPU, one that a CPU can do in a minute.

    `contexts` and prompts are in tokens, `batches` in rows, `image` and `video` in pixels of a
    side; `deep` is the batch that gets a runner of its own, since its cache fills the memory.
    """

    dtype: torch.dtype
    text: Config
    vision: Config
    ids: dict[str, int]
    batches: tuple[int, ...]
    deep: int
    contexts: tuple[int, ...]
    steps: int
    prefills: tuple[int, ...]
    image: int
    video: int
    frames: int
    requests: int
    lengths: tuple[int, int]
    generated: int
    copied_bytes: int


FULL = Scale(
    torch.bfloat16, QWEN_TEXT, QWEN_VISION, QWEN_IDS, (1, 64, 16), 256, (1024, 4096), 24,
    (1024, 8192), 1024, 512, 16, 256, (100, 1024), 24, 2**32,
)  # fmt: skip
TINY = Scale(
    torch.float32, TINY_TEXT, TINY_VISION, TINY_IDS, (1, 4), 8, (64, 256), 6,
    (64, 256), 128, 64, 4, 4, (8, 24), 6, 2**26,
)  # fmt: skip


def build(scale: Scale, device: torch.device) -> Any:
    """Make the vision-language model in eval mode, with random weights drawn on the device."""
    text = {**scale.text, "eos_token_id": None, "pad_token_id": None, "bos_token_id": None}
    config = Qwen3VLConfig(
        text_config=text, vision_config=scale.vision, tie_word_embeddings=True, **scale.ids
    )
    return _made(Qwen3VLForConditionalGeneration, config, scale, device)


def build_text_only(scale: Scale, device: torch.device) -> Any:
    """Make a text-only model of the same shape as the language part, for peers that need one."""
    rope = {"rope_type": "default", "rope_theta": scale.text["rope_parameters"]["rope_theta"]}
    text = {**scale.text, "rope_parameters": rope}
    config = Qwen3Config(**text, eos_token_id=None, pad_token_id=None, bos_token_id=None)
    return _made(Qwen3ForCausalLM, config, scale, device)


def _made(kind: Any, config: Any, scale: Scale, device: torch.device) -> Any:
    config._attn_implementation = "sdpa"  # noqa: SLF001 - from_config's argument, without its files
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(scale.dtype)
    try:
        with device:
            model = kind(config)
    finally:
        torch.set_default_dtype(before)
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            weight.data.normal_(0, 1.0 / weight[0].numel() ** 0.5)
        else:
            weight.data.fill_(0.0 if name.endswith("bias") else 1.0)
    model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=None)
    return model.eval().requires_grad_(False)


def load_for_engine(
    model: Any, scale: Scale, context: int, bucketed: BucketOptions | None
) -> LoadedModel:
    """Wrap a model for the engine. Nothing ends a sequence but its length."""
    device = model.get_input_embeddings().weight.device
    return LoadedModel(
        name="random weights",
        model=model,
        tokenizer=_tokenizer(scale.text["vocab_size"]),
        eos_ids=frozenset(),
        context_length=context,
        device=str(device),
        dtype=str(scale.dtype),
        fingerprint="",
        exact=False,
        bucketed=bucketed,
    )


def _tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Make a byte-level tokenizer of that many tokens: letters, and pairs and triples of them."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = dict.fromkeys(letters)
    size = vocab_size - 1
    for length in (2, 3):
        plain = [letter for letter in letters if letter.isascii()]
        for number in range(len(plain) ** length):
            if len(vocabulary) >= size:
                break
            digits = [number // len(plain) ** place % len(plain) for place in range(length)]
            vocabulary["".join(plain[digit] for digit in digits)] = None
    pieces = {piece: index for index, piece in enumerate(vocabulary)}
    backend = Tokenizer(models.BPE(vocab=pieces, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken("</think>", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def text_ids(length: int, seed: int) -> list[int]:
    """Draw the ids of a text."""
    draw = random.Random(seed)
    return [draw.randrange(*SAMPLE_RANGE) for _ in range(length)]


def image_prompt(scale: Scale, side: int, seed: int = 0) -> Prompt:
    """A picture of `side` pixels square between two pieces of text."""
    grid = side // PATCH
    pixels = np.random.default_rng(seed).standard_normal(
        (grid * grid, CHANNELS * FRAMES_PER_PATCH * PATCH * PATCH), dtype=np.float32
    )
    places = [scale.ids["image_token_id"]] * (grid // MERGE) ** 2
    ids = [*text_ids(8, seed), *_framed(scale, places), *text_ids(8, seed + 1)]
    tensors = {"pixel_values": pixels, "image_grid_thw": np.array([[1, grid, grid]])}
    return _with_kinds(ids, tensors, scale)


def video_prompt(scale: Scale, side: int, frames: int, seed: int = 0) -> Prompt:
    """A video of square frames; as Qwen3-VL's processor does, each pair of frames has a time."""
    grid, pairs = side // PATCH, frames // FRAMES_PER_PATCH
    pixels = np.random.default_rng(seed).standard_normal(
        (pairs * grid * grid, CHANNELS * FRAMES_PER_PATCH * PATCH * PATCH), dtype=np.float32
    )
    places = [scale.ids["video_token_id"]] * (grid // MERGE) ** 2
    ids = text_ids(8, seed)
    for pair in range(pairs):
        ids += [*text_ids(6, pair), *_framed(scale, places)]
    tensors = {"pixel_values_videos": pixels, "video_grid_thw": np.array([[pairs, grid, grid]])}
    return _with_kinds([*ids, *text_ids(8, seed + 1)], tensors, scale)


def _framed(scale: Scale, places: list[int]) -> list[int]:
    return [scale.ids["vision_start_token_id"], *places, scale.ids["vision_end_token_id"]]


def _with_kinds(ids: list[int], tensors: dict[str, Any], scale: Scale) -> Prompt:
    kinds = {scale.ids["image_token_id"]: 1, scale.ids["video_token_id"]: 2}
    row = np.array([[kinds.get(token, 0) for token in ids]], dtype=np.int32)
    return Prompt(ids, {**tensors, "mm_token_type_ids": row})
