"""How the demo model learns to see: a patch of one colour becomes the word for that colour.

What the vision tower makes stands among the embeddings of words. It first learns, on its own and in
seconds, to put there what the name of the colour has: naming a colour is copying then, which the
rest of the model begins with. Torch is imported inside the functions.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from worker import demo_corpus as corpus

# Two dimensions of the embeddings: one tells patches from words, and one is the same in all, for
# heads that see places.
SEEN, CONSTANT = 126, 127
STEPS = 150
PICTURES = 16  # in a step
LEARNING_RATE = 4e-3
Array = np.ndarray[Any, Any]


def initialize_vision(model: Any) -> None:
    """Let a patch begin as the mean colour of its first frame.

    A patch of a video holds two frames; were both seen, red before blue would look purple.
    """
    import torch

    visual = model.model.visual
    with torch.no_grad():
        kernel = visual.patch_embed.proj.weight  # size x RGB x frames x height x width
        area = kernel.shape[-1] * kernel.shape[-2]
        kernel.zero_()
        kernel[:, :, 0] = torch.randn(*kernel.shape[:2], 1, 1) / area
        visual.patch_embed.proj.bias.normal_(0, 0.5)
        visual.merger.linear_fc1.weight.normal_(0, 0.06)
        for merger in visual.deepstack_merger_list:  # they begin silent: the words say it all
            merger.linear_fc2.weight.zero_()


def learn_colours(model: Any, tokenizer: Any, draw: random.Random) -> float:
    """Train the vision tower to turn patches into the words for their colours.

    Returns:
        The last step's loss: squared distance to the words, as a share of their own variance.
    """
    import torch

    names = list(corpus.COLOURS)
    ids = tokenizer.convert_tokens_to_ids(list(corpus.COLOUR_TOKENS))
    words = model.get_input_embeddings().weight[ids].detach().clone()
    words[:, SEEN] = words[:, CONSTANT]
    visual = model.model.visual
    with torch.no_grad():
        visual.merger.linear_fc2.bias.copy_(words.mean(0))
    optimizer = torch.optim.AdamW(visual.parameters(), LEARNING_RATE, betas=(0.9, 0.95))
    loss = torch.zeros(())
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 20) * (1.02 - step / STEPS)
        patches, grids, told = _pictures(draw, names)
        seen = visual(torch.from_numpy(patches), grid_thw=torch.tensor(grids)).pooler_output
        loss = (seen - words[told]).square().mean() / words.var(0).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(visual.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.item()


def _pictures(draw: random.Random, names: list[str]) -> tuple[Array, list[list[int]], list[int]]:
    """Draw pictures as processors cut them: patches, grids, and the colour of each four patches."""
    patches, grids, told = [], [], []
    for _ in range(PICTURES):
        height, width = 2 * draw.randint(1, 3), 2 * draw.randint(1, 3)
        number = draw.randrange(len(names))
        later = draw.randrange(len(names)) if draw.random() < 0.3 else number
        count = height * width
        frames = [
            corpus.noisy(draw, corpus.shade(draw, names[name]), (count, 256))
            for name in (number, later)
        ]
        pixels = np.stack(frames, 1).transpose(0, 3, 1, 2)  # patches x RGB x frames x pixels
        patches.append(pixels.reshape(count, -1).astype(np.float32) / 127.5 - 1)
        grids.append([1, height, width])
        told += [number] * (count // 4)
    return np.concatenate(patches), grids, told
