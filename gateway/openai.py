"""The OpenAI request schema: a request body becomes a `GenerationRequest`, or a clear 400."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeVar, cast

import msgspec
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gateway.content import content_part
from gateway.fit import silent, text_bytes
from gateway.json_schema import SchemaBudget, parse_format
from gateway.reasoning import thinking_budget
from gateway.sse import SESSION_ID
from gateway.tools import parse_calls, parse_tools
from shared.errors import UnbrokenError, invalid
from shared.protocol import (
    GenerationRequest,
    MediaPart,
    Message,
    Part,
    ResponseParams,
    SamplingParams,
    TextPart,
)

if TYPE_CHECKING:
    from shared.settings import GatewaySettings

ROLES = {
    "developer": "system",
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
Body = TypeVar("Body", bound=BaseModel)
MAX_BIASES = 1024
"""Entries of `logit_bias`: each costs every step of the batch that the request is in."""

INT64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]
"""What fits the numbers that go to the worker, and from there to the engine."""

MAX_STOP_TOKENS = 1024


class StreamOptions(BaseModel):
    """What a stream carries beside the text."""

    include_usage: bool = False


class GenerationBody(BaseModel):
    """What the bodies of all endpoints that generate have in common."""

    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())

    model: str | None = None
    stream: bool | None = False
    min_tokens: int | None = Field(default=None, ge=0, lt=2**31)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, lt=2**63)
    min_p: float | None = Field(default=None, ge=0, le=1)
    seed: INT64 | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[INT64] | None = Field(default=None, max_length=MAX_STOP_TOKENS)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=10)
    logit_bias: dict[str, float] | None = None
    ignore_eos: bool | None = None
    thinking_token_budget: int | None = Field(default=None, ge=0, lt=2**31)
    thinking_budget: int | None = Field(default=None, ge=0, lt=2**31)


class ChatCompletionRequest(GenerationBody):
    """The body of `POST /v1/chat/completions`; unknown top-level keys are ignored."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    stream_options: StreamOptions | None = None
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    max_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    n: int | None = Field(default=None, ge=1, le=8)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    reasoning_effort: str | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    session_id: str | None = Field(default=None, pattern=f"^{SESSION_ID.pattern}$")


class ChatRequest(NamedTuple):
    """A parsed body: what to generate, and how its sender wants to see it.

    `digest` identifies what is generated: whether it is streamed is no part of it, nor is a seed
    that the server will draw. `text_bytes` is how much text is sure to reach the tokenizer.
    """

    generation: GenerationRequest
    digest: str
    seed_given: bool
    stream: bool
    include_usage: bool
    session_id: str | None
    model: str | None
    text_bytes: int
    response: ResponseParams | None = None
    silent: frozenset[str] = frozenset()


def unsupported(param: str, why: str = "is not supported") -> UnbrokenError:
    """Return the 400 for a field that cannot be honoured."""
    return UnbrokenError("unsupported_parameter", f"'{param}' {why}.", param)


def _refuse_unsupported(body: dict[str, Any]) -> None:
    """Refuse what would change the answer if it were ignored."""
    never = ("audio", "functions", "function_call", "web_search_options", "chat_template")
    for param in never:
        if body.get(param):
            raise unsupported(param)
    modalities = body.get("modalities")
    if modalities is not None and not isinstance(modalities, list):
        raise invalid("modalities", "must be a list")
    if "audio" in (modalities or []):
        raise unsupported("modalities", "with audio is not supported")
    if body.get("stream_options") is not None and not body.get("stream"):
        raise invalid("stream_options", "needs 'stream': true")


def _path(location: tuple[int | str, ...]) -> str:
    """Write a pydantic location as a client would: `messages[0].content`."""
    text = ""
    for part in location:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part not in ("str", "list[str]", "float", "int", "dict[str,any]"):
            text += f".{part}" if text else part
    return text


def validate(schema: type[Body], body: dict[str, Any]) -> Body:
    """Check a body against its schema.

    Raises:
        UnbrokenError: a 400 that names the first parameter at fault.
    """
    try:
        return schema.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        param = _path(first["loc"])
        raise UnbrokenError("invalid_value", f"'{param}': {first['msg']}.", param) from None


def parse_chat(body: Any, settings: GatewaySettings) -> ChatRequest:
    """Turn a JSON body into a request.

    Raises:
        UnbrokenError: a 400 that names the parameter at fault.
    """
    if not isinstance(body, dict):
        raise UnbrokenError("invalid_request", "The request body must be a JSON object.")
    if "messages" not in body:
        raise invalid("messages", "is required")
    _refuse_unsupported(body)
    chat = validate(ChatCompletionRequest, body)
    max_tokens = chat.max_completion_tokens or chat.max_tokens or settings.max_tokens
    budget = SchemaBudget()
    generation = GenerationRequest(
        messages=tuple(message(m, f"messages[{i}]") for i, m in enumerate(chat.messages)),
        sampling=msgspec.structs.replace(
            sampling(chat, settings, max_tokens, chat.n or 1, chat.reasoning_effort),
            logprobs=_logprobs(chat),
        ),
        tools=parse_tools(body, budget),
        schema=parse_format(chat.response_format, budget=budget),
        effort=chat.reasoning_effort or "",
    )
    check_counts(generation, settings, "messages")
    options = chat.stream_options or StreamOptions()
    return ChatRequest(
        generation=generation,
        digest=f"{generation.digest()}{'' if chat.seed is None else ':seeded'}",
        seed_given=chat.seed is not None,
        stream=bool(chat.stream),
        include_usage=options.include_usage,
        session_id=chat.session_id,
        model=chat.model,
        text_bytes=text_bytes(generation),
        silent=silent(chat),
    )


def _logprobs(chat: ChatCompletionRequest) -> int | None:
    """Return how many of the likeliest tokens to tell with each one's probability; None: none."""
    if chat.top_logprobs and not chat.logprobs:
        raise invalid("top_logprobs", "needs 'logprobs': true")
    return (chat.top_logprobs or 0) if chat.logprobs else None


def check_counts(generation: GenerationRequest, settings: GatewaySettings, param: str) -> None:
    """Refuse more messages or media than the server takes.

    Raises:
        UnbrokenError: a 400 that names `param`.
    """
    media = sum(isinstance(p, MediaPart) for m in generation.messages for p in m.parts)
    for count, most, what in (
        (len(generation.messages), settings.max_messages, "messages"),
        (media, settings.max_media_parts, "images and videos"),
    ):
        if count > most:
            raise UnbrokenError(
                "invalid_value", f"There are {count} {what}; the limit is {most}.", param
            )


def sampling(
    chat: GenerationBody,
    settings: GatewaySettings,
    max_tokens: int,
    choices: int,
    effort: str | None = None,
) -> SamplingParams:
    """Return how to sample, with the server's defaults where the body does not say.

    Raises:
        UnbrokenError: a 400 that names the parameter at fault.
    """
    stop = [chat.stop] if isinstance(chat.stop, str) else chat.stop or []
    if len(stop) > 4 or not all(stop):
        raise invalid("stop", "takes up to 4 non-empty strings")
    min_tokens = chat.min_tokens or 0
    if min_tokens > max_tokens:
        raise invalid("min_tokens", "exceeds 'max_tokens'")
    temperature = settings.temperature if chat.temperature is None else chat.temperature
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=temperature,
        top_p=1.0 if chat.top_p is None else chat.top_p,
        top_k=max(chat.top_k or 0, 0),
        min_p=chat.min_p or 0.0,
        seed=chat.seed or 0,
        n=choices,
        stop=tuple(stop),
        stop_token_ids=tuple(chat.stop_token_ids or ()),
        ignore_eos=bool(chat.ignore_eos),
        frequency_penalty=chat.frequency_penalty or 0.0,
        presence_penalty=chat.presence_penalty or 0.0,
        repetition_penalty=chat.repetition_penalty or 1.0,
        logit_bias=_logit_bias(chat.logit_bias or {}),
        thinking_budget=thinking_budget(effort, chat.thinking_token_budget, chat.thinking_budget),
    )


def _logit_bias(raw: dict[str, float]) -> dict[int, float]:
    if len(raw) > MAX_BIASES:
        raise invalid("logit_bias", f"has more than {MAX_BIASES} entries")
    if not all(re.fullmatch(r"[0-9]{1,9}", k) and -100 <= v <= 100 for k, v in raw.items()):
        raise invalid("logit_bias", "maps token ids to numbers from -100 to 100")
    return {int(token): bias for token, bias in raw.items()}


def message(raw: dict[str, Any], where: str) -> Message:
    """Turn a message into ours; `where` is its place in the body, for errors.

    Raises:
        UnbrokenError: a 400 that names the parameter at fault.
    """
    role = ROLES.get(raw.get("role") or "") if isinstance(raw.get("role"), str) else None
    if role is None:
        roles = ", ".join(ROLES)
        raise invalid(f"{where}.role", f"must be one of {roles}")
    if raw.get("function_call"):
        raise unsupported(f"{where}.function_call")
    calls = parse_calls(raw.get("tool_calls"), f"{where}.tool_calls")
    if calls and role != "assistant":
        raise unsupported(f"{where}.tool_calls", "belong to the assistant")
    content = raw.get("content")
    where += ".content"
    if content is None and role != "assistant":
        raise invalid(where, "is required")
    if isinstance(content, str):
        parts: tuple[Part, ...] = (TextPart(content),)
    elif isinstance(content, list):
        parts = tuple(content_part(p, f"{where}[{i}]") for i, p in enumerate(content))
    elif content is None:
        parts = ()
    else:
        raise invalid(where, "must be a string or a list")
    if role == "system" and any(isinstance(part, MediaPart) for part in parts):
        raise invalid(where, "of a system message takes text only")
    name = raw.get("name")
    call = raw.get("tool_call_id")
    return Message(
        cast("Literal['system', 'user', 'assistant', 'tool']", role),
        parts,
        name if isinstance(name, str) else None,
        call if isinstance(call, str) else None,
        calls,
    )
