"""Wire types: the request a gateway queues, and the events a worker appends to a session's log.

Everything is JSON through msgspec. Events are arrays tagged by their first element, so that a log
entry of one token stays small: `["d", 0, [1234], " word", "content"]`.
"""

from __future__ import annotations

import hashlib
from typing import Literal, Union

import msgspec

Channel = Literal["content", "reasoning"]
FinishReason = Literal["stop", "length", "tool_calls"]
CancelReason = Literal["requested", "abandoned"]
Status = Literal["queued", "running", "finished", "cancelled", "failed"]

ENDED: frozenset[str] = frozenset({"finished", "cancelled", "failed"})


class MediaRef(msgspec.Struct, frozen=True, omit_defaults=True):
    """An image or a video a message refers to.

    `url` is `http(s)://…` or `data:<type>;base64,…`; `data:video/jpeg;base64,f1,f2,…` is a list of
    JPEG frames.
    """

    kind: Literal["image", "video"]
    url: str


class TextPart(msgspec.Struct, frozen=True, tag="text", tag_field="type"):
    """A piece of text in a message."""

    text: str


class MediaPart(msgspec.Struct, frozen=True, tag="media", tag_field="type"):
    """A piece of media in a message."""

    media: MediaRef


Part = Union[TextPart, MediaPart]


class ToolCall(msgspec.Struct, frozen=True):
    """A call that the model made in an earlier turn; `arguments` is JSON as the client sent it."""

    id: str
    name: str
    arguments: str


class Message(msgspec.Struct, frozen=True, omit_defaults=True):
    """One turn of the conversation, parts in order; `developer` has become `system`."""

    role: Literal["system", "user", "assistant", "tool"]
    parts: tuple[Part, ...] = ()
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()


class Function(msgspec.Struct, frozen=True, omit_defaults=True):
    """A function that the model may call.

    `definition` is the JSON text of what the client said of it, for the prompt; `schema` that of
    the JSON Schema of its arguments. As texts they keep the order of their properties. With
    `strict` the arguments follow the schema even where the model need not call.
    """

    name: str
    definition: str
    schema: str
    strict: bool = False


class Tools(msgspec.Struct, frozen=True, omit_defaults=True):
    """The functions of a request: called if the model likes (`auto`), or at least one (`required`).

    `only` names the one that must be called; `parallel` allows more than one call.
    """

    functions: tuple[Function, ...]
    choice: Literal["auto", "required"] = "auto"
    only: str | None = None
    parallel: bool = True


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True):
    """How to draw tokens. Defaults are neutral; the gateway fills in the server's.

    `temperature` 0 is greedy. `top_k` 0 and `top_p` 1 mean off. `seed` is always set in a queued
    request (the gateway draws one where the client gives none); choice `c` of `n` draws with
    `seed + c`. `logprobs` is how many of the likeliest tokens are told beside each drawn one, None
    where nothing is. A thought that has `thinking_budget` tokens is ended; None: it may go on.
    """

    max_tokens: int = 256
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    logprobs: int | None = None
    thinking_budget: int | None = None


class GenerationRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """One generation, as queued: what to answer and how to sample.

    `schema` is the JSON text of the JSON Schema that the answer follows; empty: it is free.
    `effort` is what the request says of reasoning, for the model's chat template.
    """

    messages: tuple[Message, ...]
    sampling: SamplingParams
    tools: Tools | None = None
    schema: str = ""
    effort: str = ""

    def sampling_for(self, choice: int) -> SamplingParams:
        """Return the parameters of one of the `n` choices: each has a seed of its own."""
        if choice == 0:
            return self.sampling
        return msgspec.structs.replace(self.sampling, seed=self.sampling.seed + choice)

    def digest(self) -> str:
        """Identify the request's meaning: equal for equal requests, whatever the body's key order.

        Within JSON schemas the order counts: the answer follows it. The hex SHA-256 of the
        canonical encoding. The caller passes the request before a random seed was drawn for it, so
        that a retry of the same body has the same digest.
        """
        plain = msgspec.to_builtins(self, str_keys=True)  # sorts keys of strings only
        return hashlib.sha256(msgspec.json.encode(plain, order="deterministic")).hexdigest()


class ResponseParams(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a session that was asked for as a Response says of its request; kept in its record.

    A `background` session is not abandoned, however long nobody watches it. One without `store`
    cannot be retrieved as a response, and goes into no archive. `temperature` and the other numbers
    are those that were used; `max_output_tokens` is None where the request does not say.
    `tools`, `format` and a `tool_choice` that is more than a word are JSON, as they are shown.
    """

    background: bool = False
    store: bool = True
    temperature: float = 1.0
    top_p: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    max_output_tokens: int | None = None
    parallel_tool_calls: bool = True
    tool_choice: str = "auto"
    tools: str = "[]"
    format: str = '{"type": "text"}'
    effort: str = ""
    metadata: dict[str, str] = {}
    top_logprobs: int = 0


class Usage(msgspec.Struct, frozen=True, array_like=True):
    """Token counts of a whole session, over all its choices."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    cached_tokens: int = 0


class Started(msgspec.Struct, frozen=True, array_like=True, tag="s"):
    """Event 0: the session is queued, and will have `n` choices."""

    n: int = 1


class Delta(msgspec.Struct, frozen=True, array_like=True, tag="d"):
    """New tokens of one choice and the text they release.

    Ids wait until their text can be shown (a half-read UTF-8 character, a possible stop string), so
    that a log never ends inside held-back text. One delta holds one channel only; a token with text
    in two has its id in the second of two deltas, which are appended together.
    """

    choice: int
    ids: tuple[int, ...]
    text: str
    channel: Channel = "content"


class Scored(msgspec.Struct, frozen=True, array_like=True):
    """A token's natural log probability, and its text, or its bytes where they are no text."""

    logprob: float
    token: str | tuple[int, ...]


class TokenScores(msgspec.Struct, frozen=True, array_like=True):
    """A drawn token, and the likeliest ones in its place, best first."""

    drawn: Scored
    top: tuple[Scored, ...] = ()


class ScoredDelta(Delta, frozen=True, array_like=True, tag="p"):
    """A delta of a request that asks for log probabilities.

    `scores` are those of its tokens that show text, in order.
    """

    scores: tuple[TokenScores, ...] = ()


class CallDelta(msgspec.Struct, frozen=True, array_like=True, tag="t"):
    """New tokens of one choice and what they add to a call of a function: see `Delta` for ids.

    `call` counts the choice's calls from 0. Only the first delta of a call bears its `name`.
    """

    choice: int
    ids: tuple[int, ...]
    call: int
    arguments: str
    name: str = ""

    @property
    def channel(self) -> Literal["tool_calls"]:
        """What a `Delta` would have here."""
        return "tool_calls"


class Finished(msgspec.Struct, frozen=True, array_like=True, tag="f"):
    """The terminal event of a session that finished or was cancelled.

    `reasons` holds one finish reason per choice; `cancelled` tells why, where it was cancelled.
    """

    reasons: tuple[FinishReason, ...]
    usage: Usage
    cancelled: CancelReason | None = None


class Failed(msgspec.Struct, frozen=True, array_like=True, tag="e"):
    """The terminal event of a session that failed: an entry of `shared.errors`."""

    code: str
    message: str
    param: str | None = None


Event = Union[Started, Delta, ScoredDelta, CallDelta, Finished, Failed]
Terminal = (Finished, Failed)
Generated = (Delta, CallDelta)

_event_encoder = msgspec.json.Encoder()
_event_decoder = msgspec.json.Decoder(Event)
_request_decoder = msgspec.json.Decoder(GenerationRequest)


def encode_event(event: Event) -> bytes:
    """Encode an event as it stands in the log."""
    return _event_encoder.encode(event)


def decode_event(data: bytes) -> Event:
    """Decode a log entry.

    Raises:
        msgspec.ValidationError: the entry is not an event of this version.
    """
    event: Event = _event_decoder.decode(data)
    return event


def encode_request(request: GenerationRequest) -> bytes:
    """Encode a request as it waits in Redis."""
    return _event_encoder.encode(request)


def decode_request(data: bytes) -> GenerationRequest:
    """Decode a queued request.

    Raises:
        msgspec.ValidationError: the bytes are not a request of this version.
    """
    return _request_decoder.decode(data)
