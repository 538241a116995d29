"""The weights with which the demo model begins: not noise, but a circuit that copies.

A transformer spends most of a short training on learning to copy from its prompt ("after the word
that came before, came this"). Here that is written into the first two layers, and numbers begin as
points on circles, where "one more" is a rotation. Torch is imported inside the functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from worker.demo_corpus import LAST_NUMBER

if TYPE_CHECKING:
    import torch

DEVIATION = 0.1  # of the embeddings, to which the scale of the written circuit is fitted
CODE_DIMS = 48  # of the embeddings: a number's place on circles
CONSTANT = 127  # the embeddings' last dimension: the same in all tokens, for heads that see places


def initialize(model: Any, tokenizer: Any) -> None:
    """Draw the weights, place the numbers, and write the copying circuit."""
    import torch

    with torch.no_grad():
        model.init_weights()
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.02)
            elif name.endswith("bias"):
                weight.zero_()
        embedding = model.get_input_embeddings().weight
        embedding.normal_(0, DEVIATION)
        embedding[:, CONSTANT] = 6 * DEVIATION
        numbers = [str(number) for number in range(LAST_NUMBER + 1)]
        ids = tokenizer.convert_tokens_to_ids(numbers)
        code = torch.from_numpy(_on_circles(len(numbers))).to(embedding.dtype)
        embedding[ids, :CODE_DIMS] = code
        content = _write_copying(model)
        signs = torch.from_numpy(_far_apart(len(numbers), len(content))).to(embedding.dtype)
        embedding[ids] += (1.3 * DEVIATION * signs - embedding[ids] @ content.T) @ content


def _on_circles(count: int) -> np.ndarray[Any, Any]:
    """Place numbers on circles of 2.2 to 400 numbers round: count x `CODE_DIMS`."""
    periods = np.geomspace(2.2, 400, CODE_DIMS // 2)
    angles = 2 * np.pi * np.arange(count)[:, None] / periods
    return 1.4 * DEVIATION * np.concatenate([np.cos(angles), np.sin(angles)], axis=1)


def _far_apart(count: int, length: int) -> np.ndarray[Any, Any]:
    """Return words of signs (count x length); any two differ in a third of their places."""
    words: list[int] = []
    for word in range(2**length):
        if all((word ^ other).bit_count() * 3 >= length for other in words):
            words.append(word)
            if len(words) == count:
                break
    bits = np.array(words)[:, None] >> np.arange(length) & 1
    return 2.0 * bits - 1.0


def _write_copying(model: Any) -> torch.Tensor:
    """Write an induction circuit into the first two layers.

    It says: where the present token, or the one before, stood earlier, look at what came then. It
    matches in the dimensions that the rotary embedding hardly turns, so that distance does not
    matter.

    Returns:
        The directions (count x size) in which it tells tokens apart.
    """
    config = model.config.text_config
    size, head = config.hidden_size, config.head_dim
    first, second = (layer.self_attn for layer in model.model.language_model.layers[:2])
    content = _directions(head, range(CODE_DIMS, CONSTANT), size)
    seen = _directions(2 * head, range(CONSTANT), size)
    copied = _directions(2 * head, range(CONSTANT), size)
    slow = [*range(7, head // 2), *range(head // 2 + 7, head)]
    _look_back(first, content, seen, config.rope_parameters["rope_theta"])
    _find_again(second, content, seen, copied, slow)
    return content[: len(slow)]


def _look_back(attention: Any, content: torch.Tensor, seen: torch.Tensor, theta: float) -> None:
    """Have the first head look one token back, the second two, by the rotary angle alone.

    Each copies the `content` that it sees there into its half of the directions `seen`.
    """
    import torch

    head = len(content)
    half, fast = head // 2, 3
    frequencies = theta ** (-torch.arange(half) / half)
    attention.q_norm.weight.fill_(1.9)
    attention.k_norm.weight.fill_(1.9)
    attention.k_proj.weight[:head] *= 0.1
    attention.q_proj.weight[: 2 * head] *= 0.1
    amplitudes = torch.zeros(half)
    amplitudes[:fast] = torch.tensor([0.7, 0.55, 0.45])
    attention.k_proj.weight[:half, CONSTANT] = amplitudes
    for number, distance in enumerate((1, 2)):
        rows = attention.q_proj.weight[number * head : (number + 1) * head]
        rows[:half, CONSTANT] = amplitudes * torch.cos(frequencies * distance)
        rows[half:, CONSTANT] = -amplitudes * torch.sin(frequencies * distance)
    attention.v_proj.weight[:head] = content
    attention.o_proj.weight[:, : 2 * head] = 2 * DEVIATION * seen.T


def _find_again(
    attention: Any,
    content: torch.Tensor,
    seen: torch.Tensor,
    copied: torch.Tensor,
    slow: list[int],
) -> None:
    """Have two heads look where a token was seen, and copy what stands there.

    One looks for places right behind the present token, the other for those two behind the token
    before it. `slow` are the dimensions of a head in which they match.
    """
    head = len(content)
    attention.q_norm.weight.fill_(1.6)
    attention.k_norm.weight.fill_(1.6)
    attention.k_proj.weight *= 0.1
    for group, wanted in ((0, content), (1, seen[:head])):
        keys = slice(group * head, (group + 1) * head)
        queries = slice(2 * group * head, (2 * group + 1) * head)
        attention.q_proj.weight[queries] *= 0.1
        attention.q_proj.weight[queries][slow] = wanted[: len(slow)]
        attention.k_proj.weight[keys][slow] = seen[keys][: len(slow)]
        attention.v_proj.weight[keys] = copied[keys]
        attention.o_proj.weight[:, queries] = 3 * DEVIATION * copied[keys].T


def _directions(count: int, dims: Sequence[int], size: int) -> torch.Tensor:
    """Return orthonormal directions (count x size) within some dimensions."""
    import torch

    found = torch.zeros(count, size)
    found[:, list(dims)] = torch.linalg.qr(torch.randn(len(dims), count))[0].T
    return found
