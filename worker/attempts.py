"""How often a session is tried whose workers or engines die, or lack memory for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shared.errors import UnbrokenError

if TYPE_CHECKING:
    from shared.session_log import SessionRecord

CLAIMS_PER_ATTEMPT = 4
"""So many claims count as an attempt, since a worker may die before its engine has begun."""

FREE_CLAIMS = 2
"""A session claimed more often, without a new token, is prepared and tried in a turn of its own."""

NO_MEMORY = "There is not enough memory to go on with this answer."


def check_attempts(record: SessionRecord, most: int) -> None:
    """Give up a session under which workers or engines died again and again.

    Args:
        record: as it was when this run began.
        most: how many attempts a session has, each without a new token.

    Raises:
        UnbrokenError: it has had them.
    """
    if record.attempts >= most or record.claims > most * CLAIMS_PER_ATTEMPT:
        tries = max(record.attempts, record.claims - 1)
        raise UnbrokenError("generation_failed", f"The generation failed {tries} times.")
