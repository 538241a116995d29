"""Reads the functions that a request offers, how they are to be used, and calls made before."""

from __future__ import annotations

import json
import re
from typing import Any, cast

from gateway.json_schema import SchemaBudget, check_schema
from shared.errors import UnbrokenError, invalid
from shared.protocol import Function, ToolCall, Tools

FUNCTION_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")
MAX_FUNCTIONS = 128
NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


def parse_tools(body: dict[str, Any], budget: SchemaBudget, *, nested: bool = True) -> Tools | None:
    """Read `tools`, `tool_choice` and `parallel_tool_calls`; None where nothing may be called.

    Args:
        body: the request's.
        budget: what the request's schemas may have together; descriptions count too.
        nested: whether a tool has its function in a field `function`, as in chat completions.

    Raises:
        UnbrokenError: a 400 that names the parameter at fault.
    """
    tools = body.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise invalid("tools", "must be a list")
    tools = tools or []
    if len(tools) > MAX_FUNCTIONS:
        raise invalid("tools", f"has {len(tools)} entries; the limit is {MAX_FUNCTIONS}")
    parallel = body.get("parallel_tool_calls")
    if parallel is not None and not isinstance(parallel, bool):
        raise invalid("parallel_tool_calls", "must be true or false")
    functions = tuple(
        _function(tool, f"tools[{i}]", budget, nested=nested) for i, tool in enumerate(tools)
    )
    names = [function.name for function in functions]
    if len(set(names)) < len(names):
        raise invalid("tools", "has two functions of one name")
    choice, only = _choice(body.get("tool_choice"), names, nested=nested)
    if choice == "none" or not functions:
        return None
    return Tools(functions, cast("Any", choice), only, parallel is not False)


def _function(tool: Any, where: str, budget: SchemaBudget, *, nested: bool) -> Function:
    if not isinstance(tool, dict):
        raise invalid(where, "must be an object")
    kind = tool.get("type")
    if kind != "function":
        shown = kind[:64] if isinstance(kind, str) else "?"
        code = "unsupported_parameter" if isinstance(kind, str) else "invalid_value"
        raise UnbrokenError(
            code, f"'{where}.type' '{shown}' is not supported: 'function' is.", f"{where}.type"
        )
    if nested:
        where += ".function"
    given = tool.get("function") if nested else tool
    if not isinstance(given, dict):
        raise invalid(where, "must be an object")
    name = _name(given, where)
    described = given.get("description")
    if described is not None and not isinstance(described, str):
        raise invalid(f"{where}.description", "must be a string")
    budget.spend(f"{where}.description", characters=len(described or ""))
    strict = given.get("strict")
    if strict is not None and not isinstance(strict, bool):
        raise invalid(f"{where}.strict", "must be true or false")
    schema = given.get("parameters")
    if schema is not None and not isinstance(schema, dict):
        raise invalid(f"{where}.parameters", "must be an object")
    schema = schema or NO_ARGUMENTS
    if schema.get("type") != "object":
        raise invalid(f"{where}.parameters", 'must be a JSON Schema of "type": "object"')
    checked = check_schema(schema, f"{where}.parameters", budget)  # before it is read any further
    function = {"name": name, "description": described or "", "parameters": schema}
    definition = json.dumps({"type": "function", "function": function}, ensure_ascii=False)
    return Function(name, definition, checked, strict is True)


def _name(given: dict[str, Any], where: str) -> str:
    name = given.get("name")
    if not isinstance(name, str) or not FUNCTION_NAME.fullmatch(name):
        raise invalid(f"{where}.name", "must be 1 to 128 letters, digits, '_', '-' or '.'")
    return name


def _choice(choice: Any, names: list[str], *, nested: bool) -> tuple[str, str | None]:
    """Return `none`, `auto` or `required`, and the only function that may be called."""
    if choice is None:
        return "auto", None
    if choice in ("none", "auto"):
        return choice, None
    if choice == "required":
        if not names:
            raise invalid("tool_choice", "'required' needs 'tools'")
        return choice, None
    if not isinstance(choice, dict) or choice.get("type") != "function":
        raise invalid("tool_choice", "must be 'none', 'auto', 'required' or name a function")
    function = choice.get("function") if nested else choice
    name = function.get("name") if isinstance(function, dict) else None
    if name not in names:
        raise invalid("tool_choice", "names no function of 'tools'")
    return "required", name


def parse_calls(calls: Any, where: str) -> tuple[ToolCall, ...]:
    """Read the `tool_calls` of an assistant's message; `where` is that field, for errors.

    Raises:
        UnbrokenError: a 400 that names the parameter at fault.
    """
    if calls is None:
        return ()
    if not isinstance(calls, list):
        raise invalid(where, "must be a list")
    return tuple(_call(call, f"{where}[{i}]") for i, call in enumerate(calls))


def _call(call: Any, where: str) -> ToolCall:
    if not isinstance(call, dict) or call.get("type", "function") != "function":
        raise invalid(where, "must be a call of a function")
    function = call.get("function")
    if not isinstance(function, dict):
        raise invalid(f"{where}.function", "must be an object")
    return called(call.get("id"), function, where, f"{where}.function")


def called(call_id: Any, function: dict[str, Any], where: str, inside: str) -> ToolCall:
    """Return a call from an object with `name` and `arguments`, which stands at `inside`.

    Raises:
        UnbrokenError: a 400 that names the parameter at fault.
    """
    if call_id is not None and not isinstance(call_id, str):
        raise invalid(f"{where}.id", "must be a string")
    name = _name(function, inside)
    arguments = function.get("arguments")
    if isinstance(arguments, dict):  # some clients send what the model was meant to
        try:
            arguments = json.dumps(arguments, ensure_ascii=False)
        except RecursionError:
            raise invalid(f"{inside}.arguments", "is nested too deep") from None
    if not isinstance(arguments, str):
        raise invalid(f"{inside}.arguments", "must be a string")
    return ToolCall(call_id or "", name, arguments)
