"""Finds out whether an answer's form can be followed, in child processes that may hang or die."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from shared.errors import UnbrokenError
from worker.child import ChildDied, ChildError, ChildPool, PoolFull, StartFailed

if TYPE_CHECKING:
    from worker.engine.messages import AnswerForm

CHECK_SECONDS = 3.0
KNOWN_FORMS = 256
"""Forms whose outcome is remembered: most callers come with the same few again and again."""


class FormChecker:
    """Compiles the grammars of forms on trial.

    Args:
        processes: how many are tried at once.
        seconds: that a grammar may take.
    """

    def __init__(self, processes: int, seconds: float = CHECK_SECONDS) -> None:
        self._pool = ChildPool(
            "worker.grammar:create", size=processes, timeout=seconds, start_timeout=60
        )
        self._known: dict[bytes, UnbrokenError | None] = {}

    async def start(self) -> None:
        """Start the processes.

        Raises:
            StartFailed: that is not possible.
        """
        await self._pool.start()

    async def close(self) -> None:
        """End the processes."""
        await self._pool.close()

    async def check(self, form: AnswerForm) -> None:
        """Return if the form can be followed.

        Raises:
            UnbrokenError: `invalid_value`, naming the field at fault, where it cannot; or where
                finding out takes too long, twice. The latter is not remembered: it may be the
                machine's fault.
        """
        if not (form.schema or form.required or form.lazy):
            return
        name = hashlib.sha256(repr(form).encode()).digest()  # forms may be megabytes
        if name not in self._known:
            outcome = await self._judge(form)
            while len(self._known) >= KNOWN_FORMS:
                del self._known[next(iter(self._known))]
            self._known[name] = outcome
        error = self._known[name]
        if error:
            raise UnbrokenError(error.code, error.message, error.param)

    async def _judge(self, form: AnswerForm) -> UnbrokenError | None:
        param = "response_format" if form.schema else "tools"
        try:
            await self._try(form)
        except UnbrokenError as error:
            return error
        except ChildDied:
            raise _too_complex(param) from None
        except ChildError:
            return _too_complex(param)
        except (PoolFull, StartFailed):
            raise UnbrokenError(
                "unavailable", "The worker cannot prepare prompts now.", retry_after=1
            ) from None
        return None

    async def _try(self, form: AnswerForm) -> None:
        try:
            await self._pool.call(form)
        except ChildDied:  # out of time or memory, perhaps because of others
            await self._pool.call(form)


def _too_complex(param: str) -> UnbrokenError:
    return UnbrokenError("invalid_value", f"'{param}' is too complex to be followed.", param)
