"""The Responses request schema: a body becomes a `GenerationRequest`, or a clear 400."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Annotated, Any, cast

import msgspec
from pydantic import Field

from gateway.fit import silent, text_bytes
from gateway.json_schema import SchemaBudget, parse_format
from gateway.openai import (
    ChatRequest,
    GenerationBody,
    check_counts,
    message,
    sampling,
    unsupported,
    validate,
)
from gateway.reasoning import BUDGETS
from gateway.tools import called, parse_tools
from shared.errors import UnbrokenError, invalid
from shared.protocol import GenerationRequest, Message, ResponseParams, TextPart

if TYPE_CHECKING:
    from shared.settings import GatewaySettings

ROLES = ("user", "assistant", "system", "developer")
NEVER = ("previous_response_id", "conversation", "prompt", "context_management", "moderation")
LOGPROBS = "message.output_text.logprobs"

Metadata = dict[
    Annotated[str, Field(max_length=64)],
    Annotated[str, Field(max_length=512)],
]


class ResponsesRequest(GenerationBody):
    """The body of `POST /v1/responses`; unknown top-level keys are ignored."""

    input: str | list[dict[str, Any]] = Field(min_length=1)
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    background: bool | None = None
    store: bool | None = None
    metadata: Annotated[Metadata, Field(max_length=16)] | None = None
    parallel_tool_calls: bool | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    include: list[Any] | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)


def parse_response(body: Any, settings: GatewaySettings) -> ChatRequest:
    """Turn a JSON body into a request.

    Raises:
        UnbrokenError: a 400 that names the parameter at fault.
    """
    if not isinstance(body, dict):
        raise UnbrokenError("invalid_request", "The request body must be a JSON object.")
    if "input" not in body:
        raise invalid("input", "is required")
    _refuse_unsupported(body)
    asked = validate(ResponsesRequest, body)
    if asked.background and asked.store is False:
        raise unsupported("background", "with 'store': false is not supported")
    max_tokens = asked.max_output_tokens or settings.max_tokens
    effort, form = _effort(body), _object(body, "text").get("format")
    budget = SchemaBudget()
    generation = GenerationRequest(
        messages=_messages(asked),
        sampling=msgspec.structs.replace(
            sampling(asked, settings, max_tokens, 1, effort), logprobs=_logprobs(asked)
        ),
        tools=parse_tools(body, budget, nested=False),
        schema=parse_format(form, "text.format", budget),
        effort=effort or "",
    )
    check_counts(generation, settings, "input")
    params = _params(asked, generation, _shown_format(form, budget))
    told = hashlib.sha256(msgspec.json.encode(params, order="deterministic")).hexdigest()
    return ChatRequest(
        generation=generation,
        digest=f"{generation.digest()}{'' if asked.seed is None else ':seeded'}:response:{told}",
        seed_given=asked.seed is not None,
        stream=bool(asked.stream),
        include_usage=False,
        session_id=None,
        model=asked.model,
        text_bytes=text_bytes(generation),
        response=params,
        silent=silent(asked),
    )


def _logprobs(asked: ResponsesRequest) -> int | None:
    """Return how many of the likeliest tokens to tell; None where nobody asks to see them."""
    return (asked.top_logprobs or 0) if LOGPROBS in (asked.include or ()) else None


def _effort(body: dict[str, Any]) -> str | None:
    effort = _object(body, "reasoning").get("effort")
    if effort is not None and effort not in BUDGETS:
        raise invalid("reasoning.effort", f"must be one of {', '.join(BUDGETS)}")
    return cast("str | None", effort)


def _params(
    asked: ResponsesRequest, generation: GenerationRequest, form: dict[str, Any]
) -> ResponseParams:
    used, choice = generation.sampling, asked.tool_choice or "auto"
    return ResponseParams(
        background=bool(asked.background),
        store=asked.store is not False,
        temperature=used.temperature,
        top_p=used.top_p,
        frequency_penalty=used.frequency_penalty,
        presence_penalty=used.presence_penalty,
        max_output_tokens=asked.max_output_tokens,
        parallel_tool_calls=asked.parallel_tool_calls is not False,
        tool_choice=choice if isinstance(choice, str) else _shown_choice(choice),
        tools=json.dumps([_shown(tool) for tool in asked.tools or ()]),
        format=json.dumps(form),
        effort=generation.effort,
        metadata=asked.metadata or {},
        top_logprobs=asked.top_logprobs or 0,
    )


def _shown(tool: dict[str, Any]) -> dict[str, Any]:
    """Return a function as Responses show it, with all the fields that the SDKs expect."""
    fields = ("type", "name", "description", "parameters", "strict")
    return {**{name: tool.get(name) for name in fields}, "strict": bool(tool.get("strict"))}


def _shown_choice(choice: dict[str, Any]) -> str:
    return json.dumps({name: choice[name] for name in ("type", "name")})


def _shown_format(form: dict[str, Any] | None, budget: SchemaBudget) -> dict[str, Any]:
    """Return a format, whose schema was checked, with the fields that are known and no others."""
    if not form or form["type"] != "json_schema":
        return {"type": form["type"] if form else "text"}
    for name, kind in (("name", str), ("description", str), ("strict", bool)):
        value = form.get(name)
        if value is not None and not isinstance(value, kind):
            raise invalid(f"text.format.{name}", f"must be a {kind.__name__}")
        if isinstance(value, str):
            budget.spend(f"text.format.{name}", characters=len(value))
    known = ("type", "name", "description", "schema", "strict")
    return {name: form[name] for name in known if name in form}


def _refuse_unsupported(body: dict[str, Any]) -> None:
    """Refuse what would change the answer if it were ignored."""
    for param in NEVER:
        if body.get(param):
            raise unsupported(param)
    _refuse_options(body)
    if body.get("stream_options") is not None and not body.get("stream"):
        raise invalid("stream_options", "needs 'stream': true")


def _refuse_options(body: dict[str, Any]) -> None:
    reasoning = _object(body, "reasoning")
    for name in ("summary", "generate_summary"):
        if reasoning.get(name) not in (None, "auto"):
            raise unsupported(f"reasoning.{name}", "other than 'auto' is not supported")
    form = _object(body, "text").get("format")
    if form is not None and not isinstance(form, dict):
        raise invalid("text.format", "must be an object")
    if body.get("truncation") not in (None, "disabled"):
        raise unsupported("truncation", "other than 'disabled' is not supported")


def _object(body: dict[str, Any], param: str) -> dict[str, Any]:
    value = body.get(param)
    if value is not None and not isinstance(value, dict):
        raise invalid(param, "must be an object")
    return value or {}


def _messages(asked: ResponsesRequest) -> tuple[Message, ...]:
    given = asked.input
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    messages: list[Message] = []
    for index, item in enumerate(items):
        one = _item(item, f"input[{index}]")
        if one is None:
            continue
        last = messages[-1] if messages else None
        if last and last.role == one.role == "assistant" and one.tool_calls:  # of one turn
            calls = (*last.tool_calls, *one.tool_calls)
            messages[-1] = msgspec.structs.replace(last, tool_calls=calls)
        else:
            messages.append(one)
    if not messages:
        raise invalid("input", "holds no message")
    if asked.instructions:
        messages.insert(0, Message("system", (TextPart(asked.instructions),)))
    return tuple(messages)


def _item(item: dict[str, Any], where: str) -> Message | None:
    """Turn an input item into a message; None for a thought, which the next turn does not need."""
    kind = item.get("type", "message")
    if kind == "reasoning":
        return None
    if kind == "function_call":
        call = called(item.get("call_id"), item, where, where)
        return Message("assistant", tool_calls=(call,))
    if kind == "function_call_output":
        result = {"role": "tool", "content": item.get("output")}
        return message({**result, "tool_call_id": item.get("call_id")}, where)
    if kind != "message":
        shown = kind[:64] if isinstance(kind, str) else "?"
        raise unsupported(f"{where}.type", f"'{shown}' is not supported")
    if item.get("role") not in ROLES:
        roles = ", ".join(ROLES)
        raise invalid(f"{where}.role", f"must be one of {roles}")
    return message(item, where)
