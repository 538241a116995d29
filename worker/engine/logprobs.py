"""Log probabilities of drawn tokens, and of the likeliest ones in their places.

They are the log-softmax of the model's own logits: before bias, penalties and temperature.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence as Rows
from typing import Any

import msgspec
import numpy as np
import torch
from tokenizers import decoders
from torch import Tensor
from transformers.convert_slow_tokenizer import bytes_to_unicode

from shared.protocol import Scored, TokenScores
from worker.engine.messages import Piece
from worker.engine.sequence import Sequence

LEAST = -9999.0  # what JSON can say of a probability of 0
DIGITS = 6  # decimals of a log probability
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class TokenTexts:
    """The text of single tokens.

    Args:
        tokenizer: a Transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._added = {i: str(t) for i, t in tokenizer.added_tokens_decoder.items()}
        decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
        spelled = bytes_to_unicode() if isinstance(decoder, decoders.ByteLevel) else {}
        self._bytes = {letter: byte for byte, letter in spelled.items()}
        self._known: dict[int, str | tuple[int, ...]] = {}

    def of(self, token: int) -> str | tuple[int, ...]:
        """Return a token's text, or its bytes where they are no UTF-8; empty for an unknown one."""
        found = self._known.get(token)
        if found is None:
            raw = self._raw(token)
            try:
                found = raw.decode()
            except UnicodeDecodeError:
                found = tuple(raw)
            self._known[token] = found
        return found

    def _raw(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode()
        if token >= len(self._tokenizer):  # the model's vocabulary may be padded
            return b""
        piece = str(self._tokenizer.convert_ids_to_tokens(token))
        if self._bytes:
            return bytes(self._bytes[letter] for letter in piece)
        if byte := BYTE_TOKEN.fullmatch(piece):
            return bytes([int(byte[1], 16)])
        return piece.replace("▁", " ").encode()  # how SentencePiece spells a space


class Scorer:
    """Notes the log probabilities of what is drawn for the sequences that ask for them.

    Args:
        tokenizer: a Transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._texts = TokenTexts(tokenizer)

    @torch.inference_mode()
    def score(self, logits: Tensor, rows: Rows[Sequence], tokens: Rows[int]) -> None:
        """Put a drawn token's scores behind those that each sequence has waiting.

        Args:
            logits: [B, V], the model's own.
            rows: the B sequences; those without `scores` are passed over.
            tokens: what was drawn for them, negative where nothing was.
        """
        asked = [i for i, row in enumerate(rows) if row.scores is not None and tokens[i] >= 0]
        if not asked:
            return
        part = logits[asked] if len(asked) < len(rows) else logits
        part = part if part.dtype == torch.float64 else part.float()
        total = part.logsumexp(-1, keepdim=True)
        drawn = torch.tensor([[tokens[i]] for i in asked], device=part.device)
        chosen = _listed(part.gather(1, drawn) - total)
        width = min(max(rows[i].sampling.logprobs or 0 for i in asked), part.shape[1])
        best = part.topk(width)
        values, ids = (best.values - total).cpu().numpy(), best.indices.cpu().numpy()
        order = np.lexsort((ids, -values), axis=1)  # `topk` leaves equal ones to chance
        listed = _listed(torch.from_numpy(np.take_along_axis(values, order, 1)))
        names = np.take_along_axis(ids, order, 1).tolist()
        of, made = self._texts.of, []
        for at, i in enumerate(asked):
            count = rows[i].sampling.logprobs or 0
            pairs = zip(listed[at][:count], names[at][:count], strict=True)
            made.append(
                TokenScores(
                    Scored(chosen[at][0], of(tokens[i])), tuple(Scored(p, of(t)) for p, t in pairs)
                )
            )
        for i, scores in zip(asked, made, strict=True):  # all or none: a row may be tried again
            waiting = rows[i].scores
            assert waiting is not None  # noqa: S101 - `asked` says so
            waiting.append(scores)

    def forget(self, rows: Rows[Sequence], tokens: Rows[int]) -> None:
        """Drop the newest scores of the first rows: these tokens of theirs will be drawn again."""
        for row, token in zip(rows, tokens, strict=False):
            if row.scores is not None and token >= 0:
                row.scores.pop()


def _listed(values: Tensor) -> list[list[float]]:
    return [[round(max(v, LEAST), DIGITS) for v in row] for row in values.tolist()]


def attach(
    pieces: tuple[Piece, ...], waiting: deque[TokenScores], marks: list[bool]
) -> tuple[Piece, ...]:
    """Give pieces the scores of their tokens, which leave `waiting`.

    Args:
        pieces: in order.
        waiting: the scores of all tokens that have not left.
        marks: whether each token of the pieces shows text; the others' are dropped. Emptied.
    """
    told, left = [], iter(marks)
    for piece in pieces:
        scores = [waiting.popleft() for _ in piece.ids]
        shown = tuple(one for one in scores if next(left))
        told.append(msgspec.structs.replace(piece, scores=shown))
    marks.clear()
    return tuple(told)
