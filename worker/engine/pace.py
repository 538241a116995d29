"""How many prompt tokens fit between two decode steps, from what both have lately cost."""

from __future__ import annotations

STRETCH = 2.5
"""A step with prefill may take so many times as long as decode steps usually do."""
FLOOR = 0.5
"""A piece costs at least so much more than its forward would without any tokens."""
LEAST_TOKENS = 32
FADE = 0.9  # what a measured prefill still counts when the next one comes
USUAL, LATELY = 0.02, 0.2  # what the newest decode step counts beside all before
OUTLIER = 3.0
"""A measurement that is so many times what was to be expected says more of the machine's load."""


class Pace:
    """Seconds of decode steps, and of prefills as a line over their tokens.

    Args:
        most_tokens: of a step, whatever they cost.
    """

    def __init__(self, most_tokens: int) -> None:
        self._most = most_tokens
        self._usual = self._lately = 0.0  # seconds of a decode step
        # Sums over prefills, the older the less: of 1, t, t², s and t·s, for t tokens in s seconds.
        self._sums = (0.0, 0.0, 0.0, 0.0, 0.0)

    def decoded(self, seconds: float) -> None:
        """Take note of a step without prefill."""
        if not self._usual:
            self._usual = self._lately = seconds
        seconds = min(seconds, OUTLIER * max(self._usual, self._lately))
        self._usual += USUAL * (seconds - self._usual)
        self._lately += LATELY * (seconds - self._lately)

    def prefilled(self, tokens: int, seconds: float) -> None:
        """Take note of a prefill."""
        fixed, each = self._line()
        expected = fixed + each * tokens
        if expected:
            seconds = min(seconds, OUTLIER * expected)
        new = (1.0, tokens, tokens**2, seconds, tokens * seconds)
        first, *more = (FADE * old + one for old, one in zip(self._sums, new, strict=True))
        self._sums = (first, more[0], more[1], more[2], more[3])

    @property
    def tokens(self) -> int:
        """Most tokens to prefill before the next decode step.

        So many that the step takes `STRETCH` usual ones with the decode that follows, but no fewer
        than add `FLOOR` of what a forward costs without any: else all time went into forwards.
        """
        fixed, each = self._line()
        if not each or not self._usual:
            return self._most
        affordable = max(STRETCH * self._usual - self._lately - fixed, FLOOR * fixed) / each
        return max(min(int(affordable), self._most), min(LEAST_TOKENS, self._most))

    @property
    def overhead(self) -> int:
        """To how many tokens a forward's fixed cost amounts."""
        fixed, each = self._line()
        return min(int(fixed / each), self._most) if each else 0

    def _line(self) -> tuple[float, float]:
        """Return a prefill's fixed seconds, and those of each token."""
        count, tokens, squares, seconds, products = self._sums
        spread = count * squares - tokens**2
        if spread > 1e-3 * squares * count:  # they differ in size
            each = (count * products - tokens * seconds) / spread
            fixed = (seconds - each * tokens) / count
            if each > 0 and fixed > 0:
                return fixed, each
        return 0.0, products / squares if squares else 0.0
