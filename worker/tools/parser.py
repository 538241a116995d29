"""What a parser of tool calls is: it finds the calls in an answer while the answer grows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Found:
    """What the next `size` characters of an answer are.

    `text` is shown as it is; `markup` is not shown; `arguments` are shown as part of the open call,
    as they are, or as the field `arguments` has them. `call` is not shown either: it opens a call
    of `name`, whose arguments follow as such, the first of them from the same text; where
    `arguments` is set, these are all of them, and the call is closed. `end` is markup that closes
    an open one, with `arguments` as the last of them. It would be text without the `ahead`
    characters behind it, so it has to be logged with them.
    """

    kind: Literal["text", "markup", "call", "arguments", "end"]
    size: int
    name: str = ""
    arguments: str = ""
    ahead: int = 0

    @property
    def closes(self) -> bool:
        """Whether it is the end of a call."""
        return self.kind == "end" or (self.kind == "call" and bool(self.arguments))


class ToolParser(ABC):
    """Reads one answer. What was found depends on the text alone, not on how it came in pieces.

    Args:
        functions: names, and JSON Schemas of arguments as texts, of those that may be called.

    Attributes:
        opening: the tag that a call begins with.
    """

    opening: str

    @abstractmethod
    def __init__(self, functions: Sequence[tuple[str, str]] = ()) -> None: ...

    @staticmethod
    @abstractmethod
    def speaks(template: str) -> bool:
        """Tell whether a model with this chat template writes its calls in this way."""

    @staticmethod
    @abstractmethod
    def grammar(
        functions: Sequence[tuple[str, str]], quote: Callable[[str], str], *, parallel: bool
    ) -> str:
        """Return rules in llguidance's Lark, of which `calls` matches what this parser reads.

        Args:
            functions: names, and JSON Schemas of arguments as texts.
            quote: writes a tag or a text as the grammar's terminal for it.
            parallel: whether there may be more than one call.
        """

    @staticmethod
    @abstractmethod
    def call_grammar(
        functions: Sequence[tuple[str, str]], strict: Sequence[str], quote: Callable[[str], str]
    ) -> str:
        """Return a grammar in llguidance's Lark for one call, from behind its opening tag on.

        It accepts as soon as the call is complete; or once the name is known, where that is not
        one of the `strict`: such a call may be anything.
        """

    @staticmethod
    @abstractmethod
    def opened(name: str) -> str:
        """Return a call of a function from its opening tag to where its arguments have begun."""

    @abstractmethod
    def read(self, text: str, *, final: bool) -> Iterator[Found]:
        """Yield what is known of the text, which begins where the last `Found` ended.

        What may yet become something else is left, and given again with more text behind it;
        nothing is left where the text is `final`.
        """
