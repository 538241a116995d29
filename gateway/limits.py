"""What each key may use: requests and tokens a minute, sessions at once; counted in Redis for all.

Reading, resuming and attaching to a session costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shared import keys, metrics
from shared.errors import UnbrokenError
from shared.protocol import ENDED, MediaPart, TextPart

if TYPE_CHECKING:
    from gateway.auth import KeyLimits
    from shared.protocol import GenerationRequest
    from shared.store import Store

CHARACTERS_PER_TOKEN = 4
TOKENS_PER_MEDIUM = 512

SETTLE_SECONDS = 10
"""A session that was admitted and is not there after so long was never submitted."""

MESSAGES = {
    "requests": "This key's requests per minute are used up.",
    "tokens": "This key's tokens per minute are used up.",
    "sessions": "This key has as many sessions at once as it may have.",
}


def cost(request: GenerationRequest) -> int:
    """Estimate the most tokens that a request can use: its prompt's, and all that it asks for."""
    parts = [part for message in request.messages for part in message.parts]
    characters = sum(len(part.text) for part in parts if isinstance(part, TextPart))
    calls = [call for message in request.messages for call in message.tool_calls]
    characters += sum(len(call.name) + len(call.arguments) for call in calls)
    if request.tools:
        characters += sum(len(function.definition) for function in request.tools.functions)
    media = sum(isinstance(part, MediaPart) for part in parts)
    prompt = characters // CHARACTERS_PER_TOKEN + media * TOKENS_PER_MEDIUM
    return prompt + request.sampling.max_tokens * request.sampling.n


class RateLimits:
    """The limits of all keys.

    Args:
        store: the Redis client with the scripts.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    async def admit(self, owner: str, limits: KeyLimits, session_id: str, tokens: int) -> bool:
        """Charge a key for a new session; tells whether it was charged now, not before.

        Raises:
            UnbrokenError: `rate_limit_exceeded`, or `invalid_value` for a request that can never
                fit into the key's tokens per minute.
        """
        most = limits.tokens_per_minute
        if most is not None and tokens > most:
            raise UnbrokenError(
                "invalid_value",
                f"The request may use {tokens} tokens; this key has {most} per minute.",
                "max_tokens",
            )
        outcome, seconds = await self._admit(owner, limits, session_id, tokens)
        if outcome == "sessions" and await self._forget_ended(owner):
            outcome, seconds = await self._admit(owner, limits, session_id, tokens)
        if outcome in MESSAGES:
            metrics.RATE_LIMITED.labels(outcome).inc()
            raise UnbrokenError(
                "rate_limit_exceeded", MESSAGES[outcome], retry_after=max(1, seconds)
            )
        return outcome == "ok"

    async def refund(self, owner: str, session_id: str, tokens: int) -> None:
        """Take back what `admit` charged, for a session that was not submitted after all."""
        async with self._store.redis.pipeline(transaction=False) as pipe:
            pipe.zrem(keys.live_sessions(owner), session_id)
            pipe.hincrbyfloat(keys.levels(owner), "tokens", -tokens)
            pipe.hincrbyfloat(keys.levels(owner), "requests", -1)
            pipe.expire(keys.levels(owner), 120)
            await pipe.execute()

    async def _admit(
        self, owner: str, limits: KeyLimits, session_id: str, tokens: int
    ) -> tuple[str, int]:
        args = [session_id, tokens, limits.requests_per_minute or 0]
        args += [limits.tokens_per_minute or 0, limits.concurrent_sessions or 0]
        args += [keys.LIVE_TTL, SETTLE_SECONDS]
        names = [keys.levels(owner), keys.live_sessions(owner)]
        outcome, seconds = await self._store.run("admit", names, args)
        return outcome.decode(), seconds

    async def _forget_ended(self, owner: str) -> bool:
        """Take the sessions off a key's list that run no more; tells whether there were any."""
        name = keys.live_sessions(owner)
        listed = await self._store.redis.zrange(name, 0, -1, withscores=True)
        async with self._store.redis.pipeline(transaction=False) as pipe:
            pipe.time()
            for session_id, _ in listed:
                pipe.hget(keys.session(session_id.decode()), "status")
            (now, _), *statuses = await pipe.execute(raise_on_error=False)
        ended = [
            session_id
            for (session_id, since), status in zip(listed, statuses, strict=True)
            if _is_over(status, now - since)
        ]
        return bool(ended and await self._store.redis.zrem(name, *ended))


def _is_over(status: object, age_seconds: float) -> bool:
    if isinstance(status, bytes):
        return status.decode(errors="replace") in ENDED
    return age_seconds > SETTLE_SECONDS
