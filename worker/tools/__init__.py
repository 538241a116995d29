"""The ways in which models write calls of functions: a parser for each, in a file of its own."""

from __future__ import annotations

from worker.tools.parser import ToolParser
from worker.tools.qwen import QwenToolParser
from worker.tools.qwen_xml import QwenXmlToolParser

PARSERS: dict[str, type[ToolParser]] = {"qwen": QwenToolParser, "qwen-xml": QwenXmlToolParser}


def parser_for(template: str) -> str:
    """Return the name of the parser for models with this chat template; empty if there is none."""
    return next((name for name, parser in PARSERS.items() if parser.speaks(template)), "")
