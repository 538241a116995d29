"""What a request leaves to the model that answers it, and whether it can fit that one at all."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from shared.errors import UnbrokenError, invalid
from shared.protocol import TextPart

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gateway.openai import ChatRequest, GenerationBody
    from shared.fleet import WorkerInfo
    from shared.protocol import GenerationRequest

MODEL_DEFAULTS = ("top_p", "top_k", "min_p", "repetition_penalty")
"""What a model's `generation_config` decides where a request does not. The temperature and the
length are the owner's, by TEMPERATURE and MAX_TOKENS."""

SPACES = tuple((c, len(c.encode())) for c in map(chr, range(0x3001)) if c.isspace())
"""All white space, with its length in bytes."""


def silent(body: GenerationBody) -> frozenset[str]:
    """Return which sampling parameters a body leaves to the model."""
    return frozenset(name for name in MODEL_DEFAULTS if getattr(body, name) is None)


def with_defaults(chat: ChatRequest, worker: WorkerInfo) -> ChatRequest:
    """Fill in the model's own defaults; the digest, which is the body's, stays."""
    known = {name: value for name, value in worker.defaults.items() if name in chat.silent}
    if not known:
        return chat
    known |= {"top_k": int(known["top_k"])} if "top_k" in known else {}
    sampling = msgspec.structs.replace(chat.generation.sampling, **known)
    generation = msgspec.structs.replace(chat.generation, sampling=sampling)
    response = chat.response
    if response is not None:
        response = msgspec.structs.replace(response, top_p=sampling.top_p)
    return chat._replace(generation=generation, response=response)


def check_fits(chat: ChatRequest, workers: Sequence[WorkerInfo]) -> None:
    """Refuse what none of the workers of a model can ever run.

    Compares numbers only: it runs on the event loop. Text has at least as many tokens as it has
    times the length of the longest one. What this cannot tell, the worker finds out once it has
    counted the tokens.

    Raises:
        UnbrokenError: `context_length_exceeded`; or `min_tokens` is more than the model's context.
    """
    if not all(worker.context_length for worker in workers):
        return  # one of them may have the room
    context = max(worker.context_length for worker in workers)
    if chat.generation.sampling.min_tokens >= context:
        raise invalid(
            "min_tokens", f"leaves no room for a prompt in the model's context of {context} tokens"
        )
    if not all(worker.token_bytes for worker in workers):
        return
    least = -(-chat.text_bytes // max(worker.token_bytes for worker in workers))
    if least >= context:
        raise UnbrokenError(
            "context_length_exceeded",
            f"This model's maximum context length is {context} tokens, "
            f"but the prompt has at least {least}.",
            "messages",
        )


def text_bytes(generation: GenerationRequest) -> int:
    """Count the UTF-8 bytes that are sure to reach the tokenizer, as part of reading a body.

    Templates may trim white space, and leave out what the assistant said.
    """
    return sum(
        len(part.text.encode()) - sum(size * part.text.count(space) for space, size in SPACES)
        for message in generation.messages
        if message.role == "user"
        for part in message.parts
        if isinstance(part, TextPart)
    )
