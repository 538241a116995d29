"""Renders a session's events as OpenAI chunks, and as one completion.

What comes out depends on the log and the session's record only, so any gateway gives the same bytes
for the same event at any time.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from typing import TYPE_CHECKING, Any

import msgspec

from shared.errors import UnbrokenError
from shared.protocol import CallDelta, Delta, Failed, Finished, ScoredDelta, Started, Usage

if TYPE_CHECKING:
    from collections.abc import Iterable

    from shared.protocol import Channel, Event, Scored, TokenScores
    from shared.session_log import SessionRecord

_encode = msgspec.json.Encoder().encode

_MARK = secrets.token_hex(16)
"""Stands for a delta's text where the chunk around it is wanted."""


def usage_json(usage: Usage) -> dict[str, Any]:
    """Return the `usage` object of a completion."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def call_identity(session_id: str, choice: int, call: int) -> str:
    """Return the id of a session's call: the same wherever and whenever it is rendered."""
    return f"call_{hashlib.sha256(f'{session_id}:{choice}:{call}'.encode()).hexdigest()[:24]}"


def failure(event: Failed) -> UnbrokenError:
    """Return the error a failed session answers with."""
    return UnbrokenError(event.code, event.message, event.param)


class ChunkRenderer:
    """Renders the chunks of one session.

    Args:
        session_id: also the completion's id.
        record: gives `created`, `model`, `system_fingerprint` and the number of choices.
        include_usage: whether chunks carry `usage`, and a last one the counts.
    """

    def __init__(self, session_id: str, record: SessionRecord, *, include_usage: bool) -> None:
        head = {
            "id": session_id,
            "object": "chat.completion.chunk",
            "created": record.created,
            "model": record.model,
            "system_fingerprint": record.fingerprint or None,
        }
        self._head = json.dumps(head, separators=(",", ":")).encode()[:-1]
        self._session_id = session_id
        self._tail = b',"usage":null}' if include_usage else b"}"
        self._choices = record.choices
        self.include_usage = include_usage

    @property
    def identity(self) -> tuple[bytes, bytes]:
        """Equal for renderers that give the same bytes for the same event."""
        return self._head, self._tail

    def around_text(self, choice: int, channel: Channel) -> list[bytes]:
        """Return what surrounds the text in a delta's chunk.

        The parts joined by the text, JSON-encoded with its quotes, are the chunk: a channel may
        bear its text more than once.
        """
        return self.chunk(Delta(choice, (), _MARK, channel)).split(_encode(_MARK))

    def chunk(self, event: Event) -> bytes:
        """Return an event's data: a chunk, or the error object of a failure."""
        if isinstance(event, Delta):
            return self._join([_choice(event.choice, _delta(event), None, _logprobs([event]))])
        if isinstance(event, CallDelta):
            return self._join([_choice(event.choice, self._call(event), None)])
        if isinstance(event, Started):
            delta = {"role": "assistant", "content": ""}
            return self._join([_choice(c, delta, None) for c in range(event.n)])
        if isinstance(event, Failed):
            return _encode(failure(event).body())
        reasons = event.reasons or ("stop",) * self._choices
        choices = [_choice(c, {}, reason) for c, reason in enumerate(reasons)]
        extra: dict[str, Any] = {}
        if event.cancelled:
            extra["session"] = {"status": "cancelled", "reason": event.cancelled}
        return self._join(choices, extra)

    def usage_chunk(self, usage: Usage) -> bytes:
        """Return the chunk without choices that ends a stream with usage."""
        return self._head + b',"choices":[],"usage":' + _encode(usage_json(usage)) + b"}"

    def _call(self, event: CallDelta) -> dict[str, Any]:
        call: dict[str, Any] = {"index": event.call}
        if event.name:
            call_id = call_identity(self._session_id, event.choice, event.call)
            call |= {"id": call_id, "type": "function"}
            call["function"] = {"name": event.name, "arguments": event.arguments}
        else:
            call["function"] = {"arguments": event.arguments}
        return {"tool_calls": [call]}

    def _join(self, choices: list[dict[str, Any]], extra: dict[str, Any] | None = None) -> bytes:
        more = b"," + _encode(extra)[1:-1] if extra else b""
        return self._head + b',"choices":' + _encode(choices) + more + self._tail


def _delta(event: Delta) -> dict[str, Any]:
    if event.channel == "reasoning":
        return {"reasoning_content": event.text, "reasoning": event.text}
    return {"content": event.text}


def _choice(
    index: int, delta: dict[str, Any], reason: str | None, logprobs: dict[str, Any] | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def _logprobs(deltas: Iterable[Delta]) -> dict[str, Any] | None:
    """Return the `logprobs` of a choice's deltas, or None where they were not asked for.

    Those of thoughts stand apart, so that `content` is about the message's `content`.
    """
    scored = [delta for delta in deltas if isinstance(delta, ScoredDelta)]
    if not scored:
        return None
    tokens = {
        channel: [
            scores_json(scores) for d in scored if d.channel == channel for scores in d.scores
        ]
        for channel in ("content", "reasoning")
    }
    found: dict[str, Any] = {"content": tokens["content"], "refusal": None}
    return {**found, "reasoning_content": tokens["reasoning"]} if tokens["reasoning"] else found


def scores_json(scores: TokenScores) -> dict[str, Any]:
    """Return a drawn token with its log probability, and the likeliest ones in its place."""
    return {**_scored(scores.drawn), "top_logprobs": [_scored(other) for other in scores.top]}


def _scored(scored: Scored) -> dict[str, Any]:
    token = scored.token
    raw = token.encode() if isinstance(token, str) else bytes(token)
    text = raw.decode(errors="replace")
    return {"token": text, "bytes": list(raw), "logprob": scored.logprob}


class CompletionBuilder:
    """Gathers a session's events into one `chat.completion`."""

    def __init__(self, session_id: str, record: SessionRecord) -> None:
        self._id, self._record = session_id, record
        self._texts: dict[tuple[int, str], list[str]] = {}
        self._scored: dict[int, list[Delta]] = {}
        self._calls: dict[tuple[int, int], tuple[str, list[str]]] = {}  # name, arguments

    def add(self, event: Event) -> dict[str, Any] | None:
        """Take the next event; returns the completion after the last one, else None.

        Raises:
            UnbrokenError: the session failed.
        """
        if isinstance(event, Delta):
            self._texts.setdefault((event.choice, event.channel), []).append(event.text)
            if isinstance(event, ScoredDelta):
                self._scored.setdefault(event.choice, []).append(event)
        elif isinstance(event, CallDelta):
            _, arguments = self._calls.setdefault((event.choice, event.call), (event.name, []))
            arguments.append(event.arguments)
        elif isinstance(event, Failed):
            raise failure(event)
        elif isinstance(event, Finished):
            return self._completion(event)
        return None

    def _completion(self, event: Finished) -> dict[str, Any]:
        reasons = event.reasons or ("stop",) * self._record.choices
        answer: dict[str, Any] = {
            "id": self._id,
            "object": "chat.completion",
            "created": self._record.created,
            "model": self._record.model,
            "system_fingerprint": self._record.fingerprint or None,
            "choices": [
                {
                    "index": c,
                    "message": self._message(c),
                    "logprobs": _logprobs(self._scored.get(c, ())),
                    "finish_reason": reason,
                }
                for c, reason in enumerate(reasons)
            ],
            "usage": usage_json(event.usage),
        }
        if event.cancelled:
            answer["session"] = {"status": "cancelled", "reason": event.cancelled}
        return answer

    def _message(self, choice: int) -> dict[str, Any]:
        reasoning = "".join(self._texts.get((choice, "reasoning"), [])) or None
        content = "".join(self._texts.get((choice, "content"), []))
        calls = [
            {
                "id": call_identity(self._id, choice, call),
                "type": "function",
                "function": {"name": name, "arguments": "".join(arguments)},
            }
            for (of, call), (name, arguments) in sorted(self._calls.items())
            if of == choice
        ]
        message: dict[str, Any] = {
            "role": "assistant",
            "content": content or None if calls else content,
            "refusal": None,
            "reasoning_content": reasoning,
            "reasoning": reasoning,
        }
        return {**message, "tool_calls": calls} if calls else message
