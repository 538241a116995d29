"""Keeps what clients send from becoming a model's control tokens."""

from __future__ import annotations

import re
import secrets
from typing import Any

import numpy as np

from shared.errors import UnbrokenError

Array = np.ndarray[Any, Any]


class ControlTokens:
    """Keeps the text of clients from becoming control tokens (`<|im_end|>`, `<|image_pad|>`, …).

    Each control token has a stand-in, an added token of a random name. `hide` puts the stand-ins
    into a client's text, so that neither the processor, which counts and expands placeholders, nor
    the tokenizer sees the tokens there; `restore` then puts the ids of the same characters, read
    as ordinary text, into their places.
    """

    def __init__(self, tokenizer: Any, processor: Any) -> None:
        from transformers import AddedToken

        added = tokenizer.added_tokens_decoder
        names = {token.content for token in added.values() if token.special}
        names |= {getattr(processor, f"{kind}_token", None) for kind in ("image", "video", "audio")}
        tokens = sorted((n for n in names if n and n.strip()), key=len, reverse=True)
        self.special_ids = frozenset(index for index, token in added.items() if token.special)
        self._pattern = re.compile("|".join(map(re.escape, tokens)) or "(?!)")
        plain = [_encode_as_text(tokenizer, token) for token in tokens]
        nonce = secrets.token_hex(8)
        self._stand_ins = {token: f"q{nonce}x{n}q" for n, token in enumerate(tokens)}
        tokenizer.add_tokens(
            [AddedToken(s, special=True, normalized=False) for s in self._stand_ins.values()]
        )
        ids = tokenizer.convert_tokens_to_ids(list(self._stand_ins.values()))
        self._plain: dict[int, list[int]] = dict(zip(ids, plain, strict=True))
        self._refused = {
            token
            for token, plain_ids in zip(tokens, plain, strict=True)
            if not self.special_ids.isdisjoint(plain_ids)
        }

    def hide(self, text: str) -> str:
        """Replace the control tokens in a client's text by their stand-ins."""
        return self._pattern.sub(self._stand_in, text)

    def hide_in(self, value: Any) -> Any:
        """Do so in all strings of a JSON value, the names of its fields included."""
        if isinstance(value, str):
            return self.hide(value)
        if isinstance(value, list):
            return [self.hide_in(one) for one in value]
        if isinstance(value, dict):
            return {self.hide(name): self.hide_in(one) for name, one in value.items()}
        return value

    def _stand_in(self, match: re.Match[str]) -> str:
        if match.group() in self._refused:
            raise UnbrokenError(
                "invalid_value", f"The text contains the control token {match.group()}.", "messages"
            )
        return self._stand_ins[match.group()]

    def restore(self, outputs: dict[str, Array]) -> tuple[list[int], dict[str, Array]]:
        """Return the ids without stand-ins, and the other outputs, fitted to them."""
        ids: list[int] = outputs["input_ids"][0].tolist()
        tensors = {
            name: array
            for name, array in outputs.items()
            if name not in ("input_ids", "attention_mask")
        }
        if self._plain.keys().isdisjoint(ids):
            return ids, tensors
        lengths = [len(self._plain.get(index, (0,))) for index in ids]
        for name, array in tensors.items():
            if array.shape == (1, len(ids)):  # one value for each token
                tensors[name] = np.repeat(array, lengths, axis=1)
        return [new for old in ids for new in self._plain.get(old, (old,))], tensors


def _encode_as_text(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    return ids
