"""What an engine's output of a sequence is to its session: an event of the log, or its end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shared.errors import UnbrokenError
from shared.protocol import CallDelta, Delta, ScoredDelta
from worker.engine.messages import OUT_OF_MEMORY
from worker.parts import GiveBack

if TYPE_CHECKING:
    from worker.engine.messages import Piece

NO_MEMORY = "There is not enough memory to go on with this answer."


def delta(choice: int, piece: Piece, *, scored: bool) -> Delta | CallDelta:
    """Make an event of a piece; with log probabilities, if they are asked for."""
    if piece.call is not None:
        return CallDelta(choice, piece.ids, piece.call.index, piece.text, piece.call.name)
    if scored:
        return ScoredDelta(choice, piece.ids, piece.text, piece.channel, piece.scores)
    return Delta(choice, piece.ids, piece.text, piece.channel)


def failure(error: tuple[str, str] | tuple[str, str, str]) -> Exception:
    """Say what a sequence's error means: what its caller sees, or that others shall try it."""
    if error[0] == OUT_OF_MEMORY:
        return GiveBack(blameless=False, lacked_memory=True)
    return UnbrokenError(*error)
