"""What the worker's asyncio process and the engine process say to each other over the pipe.

Builtins and numpy arrays: neither side needs torch to read them. What every token takes along is a
msgspec struct, which costs a third of a dataclass to make and to pickle.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Union

import msgspec
import numpy as np

from shared.protocol import CancelReason, Channel, FinishReason, SamplingParams, TokenScores


@dataclass(frozen=True)
class Limits:
    """Bounds of an engine.

    `cache_bytes` is for the rows of what runs (None: from free memory), `prefix_bytes` for copies
    of what ended (0: none, and nothing is shared), `chunk_tokens` for prefill in a step.
    """

    cache_bytes: int | None = None
    prefix_bytes: int = 0
    chunk_tokens: int = 512

    @property
    def encoder_bytes(self) -> int:
        """The part of `prefix_bytes` for what encoders made of images and videos."""
        return self.prefix_bytes // 4

    @property
    def row_bytes(self) -> int:
        """The part of `prefix_bytes` for copies of rows."""
        return self.prefix_bytes - self.encoder_bytes


LIMITS = Limits()


@dataclass(frozen=True)
class EngineConfig:
    """How to load the model and how large a batch may grow."""

    model: str
    hf_token: str | None
    device_map: str
    dtype: str
    trust_remote_code: bool
    max_batch_size: int
    context_length: int
    threads: int
    exact: bool | None = None  # None: on a CPU only
    log_level: str = "INFO"
    pace_seconds: float = 0.0  # a step takes no less, where people shall watch
    limits: Limits = LIMITS
    graphs: bool = True  # on a GPU, decode in compiled and recorded steps


@dataclass(frozen=True)
class AnswerForm:
    """What the answer, behind the thought, has to look like.

    Args:
        schema: the JSON text of the JSON Schema that it follows; empty: any text.
        tools: the name of the parser (`worker.tools`) of this model's calls; empty: none are read.
        functions: the names of the functions, and the JSON Schemas of their arguments as texts.
        required: whether it has to be a call.
        parallel: whether there may be several.
        strict: the names of the functions whose arguments follow their schema in any case.
    """

    schema: str = ""
    tools: str = ""
    functions: tuple[tuple[str, str], ...] = ()
    required: bool = False
    parallel: bool = True
    strict: tuple[str, ...] = ()

    @property
    def lazy(self) -> bool:
        """Whether only calls follow a grammar, each from its opening on."""
        return bool(self.strict) and not self.schema and not self.required


FREE = AnswerForm()


@dataclass(frozen=True)
class Prompt:
    """A rendered and processed prompt.

    `input_ids` is the whole prompt, placeholders expanded; `tensors` holds the processor's other
    outputs by name (`pixel_values`, `image_grid_thw`, `mm_token_type_ids`, …), each as the model's
    `forward` takes it for a batch of one. `thinking` is true where the prompt leaves a thought
    open, so that the output begins inside the reasoning. `media` identifies the content of all its
    media; where it is empty, they are not known.
    """

    input_ids: list[int]
    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    thinking: bool = False
    media: str = ""
    form: AnswerForm = FREE


@dataclass(frozen=True)
class Add:
    """Run a sequence. `generated` are the tokens it already has from the log (continuation).

    One on `trial` has its first step alone, because it may be what an engine died of.
    """

    handle: int
    prompt: Prompt
    sampling: SamplingParams
    generated: tuple[int, ...] = ()
    trial: bool = False


@dataclass(frozen=True)
class Cancel:
    """End a sequence at its next step; it answers with a last `Output` that says so."""

    handle: int
    reason: CancelReason


@dataclass(frozen=True)
class Abort:
    """Drop a sequence without another word about it."""

    handle: int


@dataclass(frozen=True)
class Stop:
    """Leave the loop and exit."""


Command = Union[Add, Cancel, Abort, Stop]


@dataclass(frozen=True)
class Loading:
    """The model is being loaded; `stage` is a short human word, `fraction` 0..1 or None."""

    stage: str
    fraction: float | None = None


@dataclass(frozen=True)
class Ready:
    """The model is loaded. `fingerprint` names what exact continuation depends on.

    `exact` says that a sequence continued here has the tokens of an undisturbed run; `defaults` and
    `token_bytes` are those of `shared.fleet.WorkerInfo`.
    """

    model: str
    context_length: int
    device: str
    dtype: str
    fingerprint: str
    seconds: float
    exact: bool = True
    defaults: dict[str, float] = field(default_factory=dict)
    token_bytes: int = 0


@dataclass(frozen=True)
class LoadFailed:
    """The model cannot be loaded; `reason` is one clear sentence for operator and client."""

    reason: str


class Call(msgspec.Struct, frozen=True):
    """A call of a function, counted from 0; `name` stands in the first of its pieces only."""

    index: int
    name: str = ""


class Piece(msgspec.Struct, frozen=True):
    """Text released by new tokens, of one channel; that of a `call` belongs to its arguments.

    `scores` are those of the tokens that show text, where they are asked for.
    """

    ids: tuple[int, ...]
    text: str
    channel: Channel
    scores: tuple[TokenScores, ...] = ()
    call: Call | None = None


OUT_OF_MEMORY = "out_of_memory"
"""Code of the error of a sequence that this engine has no memory for; another one may have some."""


class Output(msgspec.Struct, frozen=True):
    """What one step gave one sequence; the last one bears `finish`, or `error`.

    The error is a code, a message, and the parameter at fault where there is one. The code is one
    of `shared.errors`, or `OUT_OF_MEMORY`.
    """

    handle: int
    pieces: tuple[Piece, ...] = ()
    finish: FinishReason | None = None
    cancelled: CancelReason | None = None
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    cached_tokens: int = 0
    error: Union[tuple[str, str], tuple[str, str, str], None] = None


class Step(msgspec.Struct, frozen=True):
    """All outputs of one step: one message per step.

    `batch` sequences ran in it; `cache_usage` (0 to 1) is the share of the cache's places that hold
    a token.
    """

    outputs: tuple[Output, ...]
    batch: int = 0
    cache_usage: float = 0.0


@dataclass(frozen=True)
class Busy:
    """The engine lives, and what follows is about these sequences alone; none named: about all.

    Comes around whatever a single sequence may be to blame for, and now and then between steps.
    """

    handles: tuple[int, ...] = ()


Report = Union[Loading, Ready, LoadFailed, Step, Busy]
