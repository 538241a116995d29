"""The Responses request schema: a body becomes a `GenerationRequest`, or a clear 400."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from pydantic import Field

from gateway.fit import silent
from gateway.openai import (
    ChatRequest,
    GenerationBody,
    check_counts,
    message,
    sampling,
    unsupported,
    validate,
)
from shared.errors import UnbrokenError
from shared.protocol import GenerationRequest, Message, ResponseParams, TextPart

if TYPE_CHECKING:
    from shared.settings import GatewaySettings

ROLES = ("user", "assistant", "system", "developer")
NEVER = ("previous_response_id", "conversation", "prompt", "context_management", "moderation")
NOT_YET = ("top_logprobs",)

Metadata = dict[
    Annotated[str, Field(max_length=64)],
    Annotated[str, Field(max_length=512)],
]


class ResponsesRequest(GenerationBody):
    """The body of `POST /v1/responses`; unknown top-level keys are ignored."""

    input: str | list[dict[str, Any]] = Field(min_length=1)
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    background: bool | None = None
    store: bool | None = None
    metadata: Annotated[Metadata, Field(max_length=16)] | None = None
    parallel_tool_calls: bool | None = None
    tool_choice: Literal["none", "auto"] | None = None


def parse_response(body: Any, settings: GatewaySettings) -> ChatRequest:
    """Turn a JSON body into a request.

    Raises:
        UnbrokenError: a 400 that names the parameter at fault.
    """
    if not isinstance(body, dict):
        raise UnbrokenError("invalid_request", "The request body must be a JSON object.")
    if "input" not in body:
        raise UnbrokenError("invalid_value", "'input' is required.", "input")
    _refuse_unsupported(body)
    asked = validate(ResponsesRequest, body)
    if asked.background and asked.store is False:
        raise unsupported("background", "with 'store': false is not supported")
    max_tokens = asked.max_output_tokens or settings.max_tokens
    generation = GenerationRequest(
        messages=_messages(asked), sampling=sampling(asked, settings, max_tokens, 1)
    )
    check_counts(generation, settings, "input")
    params = _params(asked, generation)
    told = hashlib.sha256(msgspec.json.encode(params, order="deterministic")).hexdigest()
    return ChatRequest(
        generation=generation,
        digest=f"{generation.digest()}{'' if asked.seed is None else ':seeded'}:response:{told}",
        seed_given=asked.seed is not None,
        stream=bool(asked.stream),
        include_usage=False,
        session_id=None,
        model=asked.model,
        response=params,
        silent=silent(asked),
    )


def _params(asked: ResponsesRequest, generation: GenerationRequest) -> ResponseParams:
    used = generation.sampling
    return ResponseParams(
        background=bool(asked.background),
        store=asked.store is not False,
        temperature=used.temperature,
        top_p=used.top_p,
        frequency_penalty=used.frequency_penalty,
        presence_penalty=used.presence_penalty,
        max_output_tokens=asked.max_output_tokens,
        parallel_tool_calls=asked.parallel_tool_calls is not False,
        tool_choice=asked.tool_choice or "auto",
        metadata=asked.metadata or {},
    )


def _refuse_unsupported(body: dict[str, Any]) -> None:
    """Refuse what would change the answer if it were ignored."""
    for param in (*NEVER, *NOT_YET):
        if body.get(param):
            raise unsupported(param)
    _refuse_tools(body)
    _refuse_options(body)
    include = body.get("include")
    if include is not None and not isinstance(include, list):
        raise UnbrokenError("invalid_value", "'include' must be a list.", "include")
    if "message.output_text.logprobs" in (include or []):
        raise unsupported("include", "of log probabilities is not supported")
    if body.get("stream_options") is not None and not body.get("stream"):
        raise UnbrokenError(
            "invalid_value", "'stream_options' needs 'stream': true.", "stream_options"
        )


def _refuse_options(body: dict[str, Any]) -> None:
    reasoning = _object(body, "reasoning")
    if reasoning.get("effort"):
        raise unsupported("reasoning.effort")
    for name in ("summary", "generate_summary"):
        if reasoning.get(name) not in (None, "auto"):
            raise unsupported(f"reasoning.{name}", "other than 'auto' is not supported")
    if _object(body, "text").get("format") not in (None, {"type": "text"}):
        raise unsupported("text.format", "other than {'type': 'text'} is not supported")
    if body.get("truncation") not in (None, "disabled"):
        raise unsupported("truncation", "other than 'disabled' is not supported")


def _refuse_tools(body: dict[str, Any]) -> None:
    tools = body.get("tools")
    first = tools[0] if isinstance(tools, list) and tools else None
    kind = first.get("type") if isinstance(first, dict) else None
    if isinstance(kind, str) and kind != "function":
        raise unsupported("tools[0].type", f"'{kind[:64]}' is not supported")
    if tools:
        raise unsupported("tools")
    if body.get("tool_choice") not in (None, "none", "auto"):
        raise unsupported("tool_choice")


def _object(body: dict[str, Any], param: str) -> dict[str, Any]:
    value = body.get(param)
    if value is not None and not isinstance(value, dict):
        raise UnbrokenError("invalid_value", f"'{param}' must be an object.", param)
    return value or {}


def _messages(asked: ResponsesRequest) -> tuple[Message, ...]:
    given = asked.input
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    read = [_item(item, f"input[{index}]") for index, item in enumerate(items)]
    messages = [one for one in read if one is not None]
    if not messages:
        raise UnbrokenError("invalid_value", "'input' holds no message.", "input")
    if asked.instructions:
        messages.insert(0, Message("system", (TextPart(asked.instructions),)))
    return tuple(messages)


def _item(item: dict[str, Any], where: str) -> Message | None:
    """Turn an input item into a message; None for a thought, which the next turn does not need."""
    kind = item.get("type", "message")
    if kind == "reasoning":
        return None
    if kind != "message":
        shown = kind[:64] if isinstance(kind, str) else "?"
        raise unsupported(f"{where}.type", f"'{shown}' is not supported")
    if item.get("role") not in ROLES:
        roles = ", ".join(ROLES)
        raise UnbrokenError(
            "invalid_value", f"'{where}.role' must be one of {roles}.", f"{where}.role"
        )
    return message(item, where)
