"""What a model's files say beside its weights: how its authors sample, how long its tokens are."""

from __future__ import annotations

from typing import Any

from tokenizers import decoders, normalizers
from transformers import GenerationConfig

RANGES = {
    "top_p": (1e-6, 1.0),
    "top_k": (0.0, 2.0**31),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 10.0),
}
SHRINKS = 3  # how many times shorter NFC can make a text, in bytes (Hangul: three letters, one)


def sampling_defaults(config: GenerationConfig | None) -> dict[str, float]:
    """Return the sampling parameters that the authors set and a request could have set, by name."""
    given = {} if config is None else config.to_diff_dict()
    found = {name: given.get(name) for name in RANGES}
    return {
        name: float(value)
        for name, value in found.items()
        if isinstance(value, (int, float)) and RANGES[name][0] <= value <= RANGES[name][1]
    }


def longest_token(tokenizer: Any) -> int:
    """Return the most bytes of a client's text that one token can stand for; 0 if not known.

    Known for byte-level tokenizers, where each letter of a token is a byte.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not isinstance(backend.decoder, decoders.ByteLevel):
        return 0
    normalizer = backend.normalizer
    if normalizer is not None and not isinstance(normalizer, normalizers.NFC):
        return 0
    longest = max(len(piece.encode()) for piece in backend.get_vocab(with_added_tokens=True))
    return longest * (SHRINKS if normalizer is not None else 1)
