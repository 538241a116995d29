"""Builds the tiny Qwen3-VL that the quick start and the tests run: real classes, made here.

`python -m worker.demo_model [folder]` trains it, so that its answers are true; with `--fast` it
gets random weights in a second. Torch and transformers are imported inside the functions, so that
importing this module stays cheap.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import logging
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

from worker import demo_batches, demo_corpus, demo_phrases, demo_training, demo_vision, demo_weights

log = logging.getLogger("unbroken.demo_model")

DEFAULT_FOLDER = Path("models/demo")
STAMP = "unbroken-demo.txt"
SEED = 20
VOCABULARY = 1024

# Id order and the special/ordinary split are Qwen's: the ordinary ones are never split by the
# tokenizer, and survive decoding with `skip_special_tokens`.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
ORDINARY_TOKENS = (
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)

# Numbers are single tokens, and so is what stands between two of them: counting to N takes 2 N - 1.
NUMBER_TOKENS = (*map(str, range(demo_corpus.LAST_NUMBER + 1)), ", ")
SEEN_TOKENS = (*demo_corpus.COLOUR_TOKENS, demo_corpus.NEXT_SCENE)

TEXT = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 5e6,
        "mrope_section": [6, 5, 5],  # text, height, width: together half of head_dim
        "mrope_interleaved": True,
    },
}
VISION = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 4,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 256,
    "deepstack_visual_indexes": [0, 1],
    "out_hidden_size": 128,
}
PATCHES = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2}
IMAGE_PIXELS = {"shortest_edge": 64 * 64, "longest_edge": 192 * 192}  # 4 to 36 tokens
VIDEO_PIXELS = {"shortest_edge": 4 * 64 * 64, "longest_edge": 16 * 96 * 96}  # 8 to 72 tokens

CORPUS = """\
What do you see in the picture? I see a red circle on the left and a blue square on the right.
How many shapes are there? There are three shapes: two green triangles and one yellow circle.
Describe the video. The white square moves from the left to the right, then it stops and turns.
What colour is it? It is black. Is it above or below the line? It is below the line, near the end.
Please write a short story about the sea. Once upon a time there was a little boat that wanted to
see the whole world. Every morning the wind came, and every evening the boat was somewhere else.
The user asks for a number, so let me think about this step by step. First, I look at the first
part; second, I look at the other part; then I add them together and check the answer again.
Hello! Thank you for your question. Yes, of course, that would be good. No, I am not sure about it.
You are a helpful assistant. Answer the following question with one word. <0.5 seconds>
The answer is 12, because 7 plus 5 is 12. Count from one to ten: 1, 2, 3, 4, 5, 6, 7, 8, 9, 10.
What is the name of the city? Write a list of things which people can make with their own hands.
This is how the stream goes on: each token comes after the last, nothing is lost or said twice.
def main(value): return value + 1  # for i in range(10): print(i)
{"name": "look", "arguments": {"where": "here"}}
"""

CHAT_TEMPLATE = """\
{%- macro body(content) -%}
  {%- if content is string -%}
    {{- content -}}
  {%- elif content is not none -%}
    {%- for part in content -%}
      {%- if part.type == 'image' or 'image' in part or 'image_url' in part -%}
        {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
      {%- elif part.type == 'video' or 'video' in part -%}
        {{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
      {%- elif 'text' in part -%}
        {{- part.text -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- set first = messages[0] if messages and messages[0].role == 'system' else none -%}
{%- if tools -%}
  {{- '<|im_start|>system\n' -}}
  {%- if first -%}{{- body(first.content) + '\n\n' -}}{%- endif -%}
  {{- 'Functions you may call, one JSON object per line:\n' -}}
  {%- for tool in tools -%}{{- (tool | tojson) + '\n' -}}{%- endfor -%}
  {{- 'To call one, write <tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call>' -}}
  {{- '<|im_end|>\n' -}}
{%- elif first -%}
  {{- '<|im_start|>system\n' + body(first.content) + '<|im_end|>\n' -}}
{%- endif -%}
{%- for message in messages -%}
  {%- if message.role == 'tool' -%}
    {%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}
      {{- '<|im_start|>user' -}}
    {%- endif -%}
    {{- '\n<tool_response>\n' + body(message.content) + '\n</tool_response>' -}}
    {%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}
      {{- '<|im_end|>\n' -}}
    {%- endif -%}
  {%- elif not (loop.first and first) -%}
    {{- '<|im_start|>' + message.role + '\n' + body(message.content) -}}
    {%- for call in message.tool_calls or [] -%}
      {%- set function = call.function or call -%}
      {{- '\n<tool_call>\n{"name": "' + function.name + '", "arguments": ' -}}
      {%- if function.arguments is string -%}
        {{- function.arguments -}}
      {%- else -%}
        {{- function.arguments | tojson -}}
      {%- endif -%}
      {{- '}\n</tool_call>' -}}
    {%- endfor -%}
    {{- '<|im_end|>\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\n<think>\n' -}}
{%- endif -%}
"""


Kind = Literal["trained", "random"]


def recipe_version(kind: Kind) -> str:
    """Identify what the model is made of: these files and the libraries that write it."""
    libraries = ("torch", "transformers", "tokenizers")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in libraries]
    modules = (
        *(demo_batches, demo_corpus, demo_phrases),
        *(demo_training, demo_vision, demo_weights),
    )
    files = [__file__, *(module.__file__ or "" for module in modules)]
    source = b"".join(Path(file).read_bytes() for file in files)
    return f"{kind} {hashlib.sha256(source + ' '.join(versions).encode()).hexdigest()}"


def ensure_demo_model(folder: Path, kind: Kind = "random") -> Path:
    """Build the demo model in `folder` unless it is there and up to date; return the folder.

    A random one takes a second, a trained one minutes, with a progress bar on stdout. The model
    appears at once, by a rename; several processes may call this at the same time.

    Raises:
        FileExistsError: the folder holds something else than a demo model.
    """
    folder = folder.absolute()
    if _is_current(folder, kind):
        return folder
    if folder.is_dir() and any(folder.iterdir()) and not (folder / STAMP).exists():
        raise FileExistsError(f"{folder} is not empty and holds no demo model")
    folder.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        fresh, stale = Path(temporary, "new"), Path(temporary, "old")
        _build(fresh, kind)
        if folder.exists() and not _is_current(folder, kind):
            folder.replace(stale)
        try:
            fresh.replace(folder)
        except OSError:
            if not _is_current(folder, kind):  # somebody else was faster, and built the same
                raise
    log.info("built the demo model in %.1f s", time.monotonic() - began)
    return folder


def _is_current(folder: Path, kind: Kind) -> bool:
    try:
        return (folder / STAMP).read_text().strip() == recipe_version(kind)
    except OSError:
        return False


def _build(folder: Path, kind: Kind) -> None:
    from transformers.utils import logging as transformers_logging

    from worker.engine.torchvision_shim import prepare_torchvision

    prepare_torchvision()
    transformers_logging.disable_progress_bar()
    folder.mkdir()
    tokenizer = _tokenizer()
    processor, model = _processor(tokenizer), _model(tokenizer)
    if kind == "trained":
        bar = demo_training.ProgressBar("training the demo model")
        wrong = demo_training.train(model, processor, bar, seed=SEED)
        if wrong:
            log.warning("the demo model still gets %d of its exam's questions wrong", wrong)
    else:
        _randomize(model, tokenizer)
    processor.save_pretrained(folder)
    model.save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)  # weights are written for their owner only, who may be another user
    (folder / STAMP).write_text(recipe_version(kind) + "\n")


def _tokenizer() -> Any:
    """Make a Qwen2 tokenizer: all 256 bytes, the corpus's most frequent merges, Qwen's tokens."""
    import json

    from tokenizers import AddedToken, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    backend = Qwen2Tokenizer().backend_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([*CORPUS.splitlines(keepends=True), *demo_corpus.texts()], trainer)
    merges = [(left, right) for left, right in json.loads(backend.to_str())["model"]["merges"]]
    pieces = dict.fromkeys(alphabet + [left + right for left, right in merges])
    tokenizer = Qwen2Tokenizer(
        vocab={piece: index for index, piece in enumerate(pieces)},
        merges=merges,
        eos_token="<|im_end|>",  # noqa: S106  # no secret
        model_max_length=TEXT["max_position_embeddings"],
        extra_special_tokens=list(SPECIAL_TOKENS),
    )
    ordinary = (*ORDINARY_TOKENS, *NUMBER_TOKENS, *SEEN_TOKENS)
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in ordinary])
    return tokenizer


def _processor(tokenizer: Any) -> Any:
    """Join the tokenizer with Qwen's image and video processors, at a tiny picture size."""
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    half = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=IMAGE_PIXELS, **PATCHES, **half),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(
            size=VIDEO_PIXELS, cap_pixels_per_frame=False, **PATCHES, **half
        ),
        chat_template=CHAT_TEMPLATE,
    )


def _model(tokenizer: Any) -> Any:
    """Make the model; its weights are still to be set."""
    import torch
    from transformers import GenerationConfig, Qwen3VLConfig, Qwen3VLForConditionalGeneration

    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    eos = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    config = Qwen3VLConfig(
        text_config={
            **TEXT,
            "vocab_size": len(tokenizer),
            "eos_token_id": eos[0],
            "pad_token_id": eos[1],
        },
        vision_config=VISION,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    model = Qwen3VLForConditionalGeneration(config).to(torch.float32).eval()
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=eos[1])
    return model


def _randomize(model: Any, tokenizer: Any) -> None:
    """Draw weights whose greedy text is lively and depends on the input.

    They are wide enough that layers outweigh the tied embedding's echo of the input.
    """
    import torch

    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if weight.dim() > 1:
                gain = 1.0 if "embed" in name else 2.0 / weight[0].numel() ** 0.5
                weight.copy_(torch.randn(weight.shape, generator=generator) * gain)
            elif name.endswith(("q_norm.weight", "k_norm.weight")):
                weight.fill_(1.6)  # sharper attention: the text depends on more than its average
        embedding = model.get_input_embeddings().weight
        embedding *= 0.3
        for piece, index in tokenizer.get_vocab().items():
            if piece in ("<|im_end|>", "</think>"):
                embedding[index] *= 1.3  # ends come now and then
            elif piece in SPECIAL_TOKENS or piece in ORDINARY_TOKENS:
                embedding[index] *= 0.02  # others next to never
            elif len(piece) == 1 and not piece.isascii():
                embedding[index] *= 0.4  # fewer halves of UTF-8 characters


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(prog="python -m worker.demo_model", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=DEFAULT_FOLDER)
    parser.add_argument("--fast", action="store_true", help="random weights: ready in a second")
    args = parser.parse_args()
    folder = ensure_demo_model(args.folder, "random" if args.fast else "trained")
    print(f"demo model ready in {folder}")


if __name__ == "__main__":
    main()
