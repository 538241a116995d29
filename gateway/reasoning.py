"""How long a model may think, as requests say it: an effort, or a budget in tokens."""

from __future__ import annotations

from shared.errors import UnbrokenError, invalid

BUDGETS: dict[str, int | None] = {
    "none": 0,
    "minimal": 256,
    "low": 1024,
    "medium": 8192,
    "high": None,
    "xhigh": None,
}
"""Tokens of a thought by `reasoning_effort`; None: as long as it likes."""


def thinking_budget(
    effort: str | None, *budgets: int | None, param: str = "reasoning_effort"
) -> int | None:
    """Return the most tokens of a thought: a budget that is given, else the effort's.

    Raises:
        UnbrokenError: `invalid_value`, where there is no such effort, or two budgets differ.
    """
    if effort is not None and effort not in BUDGETS:
        raise invalid(param, f"must be one of {', '.join(BUDGETS)}")
    given = {budget for budget in budgets if budget is not None}
    if len(given) > 1:
        raise UnbrokenError(
            "invalid_value",
            "'thinking_budget' and 'thinking_token_budget' disagree.",
            "thinking_token_budget",
        )
    return given.pop() if given else BUDGETS[effort] if effort else None
