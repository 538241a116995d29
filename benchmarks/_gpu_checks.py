"""Whether the engine is right on this device: attention, `generate()`'s tokens, determinism."""

from __future__ import annotations

import copy
import platform
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from benchmarks._gpu_bench import (
    EXACT,
    FAST,
    READY,
    STAGES,
    Bench,
    Cells,
    next_logits,
    prefill,
    row,
)
from benchmarks._gpu_measure import Figures
from benchmarks._gpu_model import image_prompt, text_ids
from benchmarks._gpu_speed import step_timing
from worker.engine.messages import Prompt
from worker.engine.model_runner import ModelRunner
from worker.engine.ragged import PATHS, TOLERANCE, unavailable, worst_error
from worker.engine.sequence import Sequence

AS_FAR = 2.0  # how much farther from the wider numbers than `generate()` is still rounding
LENGTHS = (37, 5, 120)  # of the prompts that are compared; and an image


def environment(bench: Bench) -> Cells:
    """Name versions and device, and measure what the floors are made of."""
    yield "versions", partial(_versions, bench)
    yield "copy", lambda: {"bytes_per_s": bench.bandwidth}
    yield "matrix product", lambda: {"operations_per_s": bench.matrix_rate}
    yield "model", partial(_model, bench)
    yield "steps", lambda: {**bench.working}


def _versions(bench: Bench) -> Figures:
    device = torch.cuda.get_device_name(bench.device) if bench.cuda else platform.machine()
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": version("transformers"),
        "cuda": torch.version.cuda,
        "device": device,
        "dtype": str(bench.scale.dtype).removeprefix("torch."),
        "compiler": "inductor" if bench.cuda else "none: steps are only traced",
    }


def _model(bench: Bench) -> Figures:
    return {
        "parameters": sum(weight.numel() for weight in bench.model.parameters()),
        "step_bytes": bench.step_bytes(0, 0),
        "token_bytes": bench.step_bytes(1, 1) - bench.step_bytes(0, 0),
    }


def correctness(bench: Bench) -> Cells:
    """Hold attention against float32, and the engine's logits against those of `generate()`."""
    for name in PATHS:
        for whole in (False, True):
            label = f"attention {name}{', not split' if whole else ''}"
            yield label, partial(_attention, bench, name, whole=whole)
    reference = Reference(bench)
    for stage in ("eager", "ragged", STAGES[-1]):
        yield f"greedy, {stage}", partial(_greedy, bench, reference, stage)


def _attention(bench: Bench, name: str, *, whole: bool) -> Figures:
    reason = unavailable(name, bench.device, bench.scale.dtype)
    if reason:
        return {"left_out": reason}
    error = worst_error(name, bench.device, bench.scale.dtype, whole=whole)
    most = TOLERANCE[bench.scale.dtype]
    return {"error": error, "most": most, "passed": error <= most}


class Reference:
    """What `generate()` says greedily, and what a wider dtype makes of the same tokens."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._made: list[tuple[Prompt, list[int], Tensor, Tensor]] = []

    def __call__(self) -> list[tuple[Prompt, list[int], Tensor, Tensor]]:
        """Return, for each prompt, the tokens, the logits `[T, V]`, and the wider ones."""
        if not self._made:
            scale = self._bench.scale
            prompts = [Prompt(text_ids(length, length)) for length in LENGTHS]
            prompts.append(image_prompt(scale, scale.image // 4))
            model = self._bench.model
            wider = copy.deepcopy(model).to(
                torch.float64 if scale.dtype == torch.float32 else torch.float32
            )
            self._made = [self._compute(model, wider, prompt) for prompt in prompts]
        return self._made

    @torch.inference_mode()
    def _compute(self, model: Any, wider: Any, prompt: Prompt) -> Any:
        count, inputs = self._bench.scale.generated, self._inputs(prompt, model.dtype)
        size = len(prompt.input_ids)
        answer = model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=count,
            return_dict_in_generate=True,
            output_logits=True,
        )
        tokens = answer.sequences[0, size:].tolist()
        whole = Prompt([*prompt.input_ids, *tokens[:-1]], prompt.tensors)
        logits = wider(**self._inputs(whole, wider.dtype), logits_to_keep=count).logits[0]
        return prompt, tokens, torch.cat(answer.logits), logits

    def _inputs(self, prompt: Prompt, dtype: torch.dtype) -> dict[str, Tensor]:
        ids = torch.tensor([prompt.input_ids], device=self._bench.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for name, array in prompt.tensors.items():
            tensor = torch.from_numpy(array).to(self._bench.device)
            inputs[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        kinds = inputs.get("mm_token_type_ids")
        if kinds is not None:
            more = ids.shape[1] - kinds.shape[1]
            inputs["mm_token_type_ids"] = torch.nn.functional.pad(kinds, (0, more))
        return inputs


@torch.inference_mode()
def forced(runner: ModelRunner, sequences: list[Sequence], steps: int) -> Tensor:
    """Prefill prompts, then feed the tokens that are known: the logits `[steps, rows, V]`."""
    first = prefill(runner, sequences)
    return torch.stack([first, *(next_logits(runner, sequences) for _ in range(steps - 1))])


def _greedy(bench: Bench, reference: Reference, stage: str) -> Figures:
    """Feed `generate()`'s tokens to a batch that holds each prompt several times.

    Rounding differs, and logits of random weights nearly tie; so what counts is that ours are no
    farther from the wider ones than `generate()`'s are.
    """
    rows, made, count = bench.scale.batches[-1], reference(), bench.scale.generated
    runner = bench.runner(stage, max(bench.scale.batches))
    chosen = [made[slot % len(made)] for slot in range(rows)]
    sequences = [
        row(slot, prompt, tokens, bench.room) for slot, (prompt, tokens, *_) in enumerate(chosen)
    ]
    found = forced(runner, sequences, count).transpose(0, 1)
    ours, theirs = [], []
    same = 0
    for logits, (_, tokens, logits_there, wide) in zip(found, chosen, strict=True):
        ours.append(_distance(logits, wide))
        theirs.append(_distance(logits_there, wide))
        same += sum(a == b for a, b in zip(logits.argmax(-1).tolist(), tokens, strict=True))
    here, there = max(ours), max(theirs)
    return {
        "tokens": rows * count,
        "equal_tokens": same,
        "distance": here,
        "distance_of_generate": there,
        "compared_in": str(made[0][3].dtype).removeprefix("torch."),
        "passed": here <= AS_FAR * there,
    }


def _distance(logits: Tensor, wide: Tensor) -> float:
    """Return the largest relative distance of logits `[T, V]`, token by token."""
    wide = wide.double()
    return float(((logits.double() - wide).norm(dim=-1) / wide.norm(dim=-1)).max())


def determinism(bench: Bench) -> Cells:
    """Compare one sequence's logits bit by bit, wherever it runs and whatever was before."""
    bench.release(STAGES[-1])
    rows = max(bench.scale.batches)
    for mode in (EXACT, FAST):
        standard: list[Tensor] = []
        yield f"{mode}, {READY}", partial(_warm, bench, mode, rows)
        for name, options in SCENES.items():
            call = partial(_scene, bench, mode, rows, standard, **options)
            yield f"{mode}, {name}", call
        for batch in (1, rows):
            yield f"{mode}, step of {batch}", partial(_cost, bench, mode, rows, batch)


SCENES: dict[str, dict[str, bool]] = {
    "alone in the first row, again": {},
    "alone in the last row": {"last": True},
    "first row of a full batch": {"full": True},
    "last row of a full batch": {"full": True, "last": True},
    "replayed among others": {"full": True, "last": True, "others_ahead": True},
    "prefilled with its answer": {"whole": True},
}


def _warm(bench: Bench, mode: str, rows: int) -> Figures:
    """Make the steps, which may take a minute where they are compiled; say what they are."""
    steps, runner = bench.options(mode), bench.runner(mode, rows)
    forced(runner, [row(0, Prompt(text_ids(8, 1)), text_ids(8, 2), bench.room)], 2)
    return {"attention": runner.attention, "steps": str(steps) if steps else "plain"}


def _scene(bench: Bench, mode: str, rows: int, standard: list[Tensor], **scene: bool) -> Figures:
    """Compare the logits behind a sequence's known tokens with those of the first scene."""
    if not standard:
        standard.append(_logits(bench, mode, rows))
    found = _logits(bench, mode, rows, **scene)
    expected = standard[0][-len(found) :]
    return {
        "equal": bool(torch.equal(found, expected)),
        "largest_difference": float((found - expected).abs().max()),
        "equal_tokens": float((found.argmax(-1) == expected.argmax(-1)).float().mean()),
    }


@torch.inference_mode()
def _logits(
    bench: Bench,
    mode: str,
    rows: int,
    *,
    last: bool = False,
    full: bool = False,
    others_ahead: bool = False,
    whole: bool = False,
) -> Tensor:
    """Return the logits `[T, V]` behind a sequence's known tokens.

    `whole` prefills half of its answer, as a takeover without replay does; with `others_ahead` the
    other rows have been running for a while, as when a sequence is taken over.
    """
    count = bench.scale.generated
    answer = text_ids(count, 2)
    runner, place = bench.runner(mode, rows), rows - 1 if last else 0
    known = count // 2 if whole else 0
    one = row(place, Prompt(text_ids(40, 1) + answer[:known]), answer[known:], bench.room)
    others = [
        row(slot, Prompt(text_ids(8 + slot, slot)), text_ids(2 * count, slot), bench.room)
        for slot in range(rows)
        if full and slot != place
    ]
    if others_ahead:
        _advance(runner, others, count // 2, place)
    sequences = sorted([one, *others], key=lambda s: s.slot)
    fresh = [s for s in sequences if s.length == 0]
    first = prefill(runner, fresh)[fresh.index(one)]
    at = sequences.index(one)
    steps = range(count - known - 1)
    return torch.stack([first, *(next_logits(runner, sequences)[at] for _ in steps)])


def _advance(runner: ModelRunner, others: list[Sequence], steps: int, place: int) -> None:
    """Let the other rows run ahead, in the groups that the free row leaves."""
    prefill(runner, others)
    groups = [[s for s in others if s.slot < place], [s for s in others if s.slot > place]]
    for group in filter(None, groups):
        for _ in range(steps):
            next_logits(runner, group)


def _cost(bench: Bench, mode: str, rows: int, batch: int) -> Figures:
    """Time a step at the shorter context."""
    runner = bench.runner(mode, rows)
    return step_timing(bench, runner, mode, batch, bench.scale.contexts[0])
