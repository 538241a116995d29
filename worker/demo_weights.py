"""The weights with which the demo model begins: not noise, but a circuit that copies.

A transformer spends most of a short training on learning to copy from its prompt ("after the word
that came before, came this"). Here that is written into the first two layers, and numbers begin as
points on circles, where "one more" is a rotation. Torch is imported inside the functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from worker.demo_corpus import COLOUR_TOKENS, COLOURS, LAST_NUMBER
from worker.demo_vision import CONSTANT, SEEN, initialize_vision

if TYPE_CHECKING:
    import torch

DEVIATION = 0.1  # of the embeddings, to which the scale of the written circuit is fitted
CODE_DIMS = 48  # of the embeddings: a number's place on circles


def initialize(model: Any, tokenizer: Any) -> torch.Tensor:
    """Draw the weights, place the numbers, and write the circuits.

    Returns:
        Orthonormal directions (count x size) by which heads know tokens and patches: nothing else
        may write there before they have read it.
    """
    import torch

    with torch.no_grad():
        model.init_weights()
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.02)
            elif name.endswith("bias"):
                weight.zero_()
        initialize_vision(model)
        for layer in model.model.language_model.layers:  # leave the marks of patches as they are
            layer.self_attn.o_proj.weight *= 0.1  # what is read for written heads is loud
            layer.self_attn.o_proj.weight[[SEEN, CONSTANT]] = 0
            layer.mlp.down_proj.weight[[SEEN, CONSTANT]] = 0
        embedding = model.get_input_embeddings().weight
        embedding.normal_(0, DEVIATION)
        embedding[:, CONSTANT] = 6 * DEVIATION
        embedding[:, SEEN] = -2 * DEVIATION
        numbers = [str(number) for number in range(LAST_NUMBER + 1)]
        ids = tokenizer.convert_tokens_to_ids(numbers)
        code = torch.from_numpy(_on_circles(len(numbers))).to(embedding.dtype)
        embedding[ids, :CODE_DIMS] = code
        content, before = _write_circuit(model)
        signs = torch.from_numpy(_far_apart(len(ids), len(content))).to(embedding.dtype)
        ids += tokenizer.convert_tokens_to_ids(list(COLOUR_TOKENS))
        apart = _directions(len(COLOURS), range(len(content)), len(content))
        signs = torch.cat([signs, len(content) ** 0.5 * apart])
        embedding -= embedding @ before.T @ before  # no word looks like a patch's past
        embedding[ids] += (1.3 * DEVIATION * signs - embedding[ids] @ content.T) @ content
        return torch.cat([content, before, torch.eye(embedding.shape[1])[[SEEN, CONSTANT]]])


def written(model: Any) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
    """Return the parameters that hold the circuit; for each, ones where it lies, else zeros."""
    import torch

    found = []
    for layer, queries, keys in ((0, (0, 1, 2), (0, 1)), (1, (0, 2), (0, 1)), (2, (0, 1), (0,))):
        attention = model.model.language_model.layers[layer].self_attn
        head = attention.head_dim
        asks, answers = (
            [dim for number in numbers for dim in range(number * head, (number + 1) * head)]
            for numbers in (queries, keys)
        )
        places: list[tuple[torch.nn.Parameter, Any]] = [
            (attention.q_proj.weight, asks),
            (attention.k_proj.weight, answers),
            (attention.v_proj.weight, answers),
            (attention.o_proj.weight, (slice(None), asks)),
            (attention.q_norm.weight, slice(None)),
            (attention.k_norm.weight, slice(None)),
        ]
        for parameter, place in places:
            where = torch.zeros_like(parameter)
            where[place] = 1
            found.append((parameter, where))
    return found


def writers(model: Any) -> list[torch.nn.Parameter]:
    """Return the parameters (size x inputs, or size) that write what the circuits read later."""
    language, visual = model.model.language_model, model.model.visual
    found = [model.get_input_embeddings().weight]
    for layer in language.layers[:2]:
        found += [layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight]
    for merger in visual.deepstack_merger_list:
        found += [merger.linear_fc2.weight, merger.linear_fc2.bias]
    return found


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


def _write_circuit(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Write an induction circuit into the first two layers, and one for scenes into the third.

    It says: where the present token, or the one before, stood earlier, look at what came then. It
    matches in the dimensions that the rotary embedding hardly turns, so that distance does not
    matter.

    Returns:
        The directions (count x size) in which it tells tokens apart, and those where patches keep
        the colour of the frame before.
    """
    config = model.config.text_config
    size, head = config.hidden_size, config.head_dim
    first, second, third = (layer.self_attn for layer in model.model.language_model.layers[:3])
    content = _directions(head, range(CODE_DIMS, SEEN), size)
    seen = _directions(2 * head, range(SEEN), size, apart_from=[content])
    slow = [*range(7, head // 2), *range(head // 2 + 7, head)]
    matched = content[: len(slow)]
    before = _directions(len(slow), range(SEEN), size, apart_from=(content, seen))
    copied = _directions(
        2 * head, range(SEEN), size, apart_from=(before, matched, seen[: len(slow)])
    )
    _look_back(first, content, seen, config.rope_parameters["rope_theta"])
    _look_at_last_frame(first, matched, before, config.rope_parameters["rope_theta"])
    _find_again(second, content, seen, copied, slow)
    _find_next_scene(third, matched, seen[: len(slow)], before, slow)
    return matched, before


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


def _look_at_last_frame(
    attention: Any, content: torch.Tensor, before: torch.Tensor, theta: float
) -> None:
    """Have the third head look from the patches of a frame to those of the frame before.

    They are 9 to 12 places back: the time that stands between takes 8, and patches as many as the
    longer side of their grid. The head copies the `content` there into the directions `before`.
    """
    import torch

    head = attention.head_dim
    half, distance = head // 2, 10.5
    frequencies = theta ** (-torch.arange(half) / half)
    keys, queries = slice(head, 2 * head), slice(2 * head, 3 * head)
    amplitudes = torch.zeros(half)
    amplitudes[[1, 2, half - 1]] = torch.tensor([0.3, 0.3, 0.4]).sqrt()  # the last hardly turns
    attention.k_proj.weight[keys] *= 0.1
    attention.q_proj.weight[queries] *= 0.1
    attention.k_proj.weight[keys][:half, SEEN] = amplitudes
    rows = attention.q_proj.weight[queries]
    rows[:half, SEEN] = amplitudes * torch.cos(frequencies * distance)
    rows[half:, SEEN] = -amplitudes * torch.sin(frequencies * distance)
    values, told = keys.start + len(content), queries.start + len(content)
    attention.v_proj.weight[keys.start : values] = content
    attention.o_proj.weight[:, queries.start : told] = 2 * DEVIATION * before.T


def _find_next_scene(
    attention: Any,
    content: torch.Tensor,
    seen: torch.Tensor,
    before: torch.Tensor,
    slow: list[int],
) -> None:
    """Have two heads look for patches that follow a frame of a colour, and are of another.

    The colour is that of the token before the present one, or of the present one. The first head
    says what comes; the second, that something comes: where nothing does, it looks at words.
    """
    head, count = attention.head_dim, len(before)
    flag = attention.head_dim // 2 - 1
    match = [dim for dim in slow if dim != flag]
    attention.q_norm.weight.fill_(2.0)
    attention.k_norm.weight.fill_(2.0)
    attention.k_proj.weight[:head] *= 0.1
    attention.k_proj.weight[:head][match] = (before - 1.5 * content)[: len(match)]
    attention.k_proj.weight[flag, SEEN] = 0.4
    attention.v_proj.weight[: count + 1] = 0
    attention.v_proj.weight[:count] = content
    attention.v_proj.weight[count, SEEN] = 1.0
    for number, (wanted, patches) in enumerate(((seen, 0.45), (2 * content, -0.45))):
        queries = slice(number * head, (number + 1) * head)
        attention.q_proj.weight[queries] *= 0.1
        attention.q_proj.weight[queries][match] = wanted[: len(match)]
        attention.q_proj.weight[number * head + flag, CONSTANT] = patches
    attention.o_proj.weight[:, :count] = 3 * DEVIATION * content.T
    more = _directions(1, range(SEEN), content.shape[1], apart_from=(content, before))
    attention.o_proj.weight[:, head + count] = 10 * DEVIATION * more[0]


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


def _directions(
    count: int, dims: Sequence[int], size: int, apart_from: Sequence[torch.Tensor] = ()
) -> torch.Tensor:
    """Return orthonormal directions (count x size) within some dimensions, apart from others."""
    import torch

    drawn = torch.zeros(size, count)
    drawn[list(dims)] = torch.randn(len(dims), count)
    if apart_from:
        others = torch.linalg.qr(torch.cat(list(apart_from)).T)[0]
        drawn -= others @ (others.T @ drawn)
    return torch.linalg.qr(drawn)[0].T.contiguous()
