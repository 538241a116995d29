"""Draws a step's tokens, those that are allowed, with their log probabilities.

A row that cannot be drawn fails alone.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from worker.engine.logprobs import Scorer
from worker.engine.masks import Masks
from worker.engine.memory import lacks_memory
from worker.engine.sampler import BAD_ROW, Sampler
from worker.engine.sequence import Sequence

log = logging.getLogger("unbroken.engine")


class Drawer:
    """Sampler and scorer of one model.

    Args:
        vocab_size: V, the width of the logits.
        device: where the logits are.
        tokenizer: a Transformers tokenizer.
    """

    def __init__(self, vocab_size: int, device: torch.device, tokenizer: Any) -> None:
        self.sampler, self._scorer = Sampler(vocab_size, device), Scorer(tokenizer)
        self.masks = Masks(vocab_size, device)

    def draw(self, logits: Tensor, rows: list[Sequence]) -> list[int]:
        """Draw a token per row of `[B, V]`; `BAD_ROW` where that is not possible.

        Raises:
            torch.AcceleratorError: the device is lost.
            Exception: memory is short even for a row by itself (`lacks_memory`); as if nothing had
                been drawn.
        """
        try:
            return self._draw(logits, rows)
        except torch.AcceleratorError:
            raise
        except Exception:
            log.exception("sampling failed; trying row by row")
        tokens = list[int]()
        for index, sequence in enumerate(rows):
            try:
                tokens += self._draw(logits[index : index + 1], [sequence])
            except torch.AcceleratorError:
                raise
            except Exception as error:
                if lacks_memory(error):
                    self._scorer.forget(rows, tokens)
                    raise
                log.exception("sampling failed for a row")
                tokens.append(BAD_ROW)
        return tokens

    def _draw(self, logits: Tensor, rows: list[Sequence]) -> list[int]:
        tokens = self.sampler.sample(self.masks.apply(logits, rows), rows)
        self._scorer.score(logits, rows, tokens)
        return tokens
