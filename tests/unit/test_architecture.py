"""The rules of the house, and that each of them can be broken."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("gateway", "worker", "shared")
SCRIPTS = ("run.py", "supervisor.py")

FILE_LINES = 350
FUNCTION_LINES = 60

TORCH = {"torch", "torchvision", "transformers", "accelerate"}
FORBIDDEN = {
    "gateway": {*TORCH, "worker"},
    "worker": {"fastapi", "starlette", "uvicorn", "gateway"},
}
SHARED_MAY = {
    "shared",
    "pydantic",
    "pydantic_settings",
    "msgspec",
    "redis",
    "hiredis",
    "arq",
    "prometheus_client",
    *sys.stdlib_module_names,
}
KEY_PREFIX = re.compile(r"(unbroken|arq):")


def sources(*folders: str) -> list[Path]:
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert files
    return files


def imports(source: str, *, everywhere: bool = True) -> set[str]:
    """Return the top-level packages that a module imports, or imports when it is loaded."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)) if everywhere else loaded_nodes(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0] if not node.level else "")
    return names


def loaded_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes that run on import: not function bodies, not `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from loaded_nodes(node)


def wrong_imports(source: str, package: str) -> set[str]:
    """Return what a module of `package` imports and must not."""
    found = imports(source)
    return found - SHARED_MAY if package == "shared" else found & FORBIDDEN[package]


def torch_on_import(source: str) -> set[str]:
    """Return the heavy packages that loading a module would load."""
    return imports(source, everywhere=False) & TORCH


def long_functions(source: str) -> list[str]:
    """Return the names of the functions that are too long."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [
        node.name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, functions) and (node.end_lineno or 0) - node.lineno + 1 > FUNCTION_LINES
    ]


def environment_reads(source: str) -> list[int]:
    """Return the lines that touch the environment."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if (isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv", "environb"})
        or (
            isinstance(node, ast.ImportFrom)
            and node.module == "os"
            and {alias.name for alias in node.names} & {"environ", "getenv", "environb"}
        )
    ]


def key_literals(source: str) -> list[str]:
    """Return the strings that look like a Redis key: plain, or the beginning of an f-string."""
    return [
        node.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and KEY_PREFIX.match(node.value)
    ]


def lua_faults(source: str) -> list[str]:
    """Return what is wrong with a script: no comment at its top, or a key of its own."""
    faults = [] if source.startswith("--") else ["begins without a comment"]
    code = re.sub(r"--.*", "", source)
    return faults + [f"names the key {m}" for m in re.findall(r"(?:unbroken|arq):\S*", code)]


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_what_the_layers_allow(package: str) -> None:
    """The layers are gateway → shared ← worker; shared stands on few libraries."""
    wrong = {str(p): wrong_imports(p.read_text(), package) for p in sources(package)}
    assert not {path: names for path, names in wrong.items() if names}


def test_torch_is_loaded_in_the_engine_folder_alone() -> None:
    """No module outside `worker/engine` loads torch or transformers when it is imported."""
    for path in sources(*PACKAGES):
        if "engine" not in path.relative_to(ROOT).parts:
            assert not torch_on_import(path.read_text()), path


def test_files_and_functions_stay_small() -> None:
    """A file can be read in one go, a function at one glance."""
    for path in [*sources(*PACKAGES), *(ROOT / name for name in SCRIPTS)]:
        source = path.read_text()
        assert source.count("\n") <= FILE_LINES, path
        assert not long_functions(source), path


def test_only_the_settings_read_the_environment() -> None:
    """Whoever wants a setting gets it as an argument."""
    for path in sources(*PACKAGES):
        if path != ROOT / "shared" / "settings.py":
            assert not environment_reads(path.read_text()), path


def test_key_names_stand_in_one_file() -> None:
    """No Redis key is spelled outside `shared/keys.py`."""
    for path in sources(*PACKAGES):
        if path != ROOT / "shared" / "keys.py":
            assert not key_literals(path.read_text()), path


def test_scripts_state_their_invariant_and_get_all_keys() -> None:
    """Each Lua script begins with a comment and takes its keys from the caller."""
    scripts = sorted((ROOT / "shared" / "lua").glob("*.lua"))
    assert scripts
    assert not {s.name: faults for s in scripts if (faults := lua_faults(s.read_text()))}


@pytest.mark.parametrize("module", ["gateway.main", "worker.main"])
def test_importing_a_composition_root_loads_no_torch(module: str) -> None:
    """Neither the gateway nor the worker's asyncio process pays for torch."""
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=25
    )
    assert done.returncode == 0, done.stderr
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert not loaded & TORCH
    assert "shared" in loaded


LONG = "def long():\n" + "    x = 1\n" * FUNCTION_LINES
INSIDE = "def f():\n    import torch\n"
TYPES = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\n"


@pytest.mark.parametrize(
    ("check", "bad", "good"),
    [
        (lambda s: wrong_imports(s, "gateway"), "import torch.nn", "import shared.keys"),
        (lambda s: wrong_imports(s, "gateway"), INSIDE, "import msgspec"),
        (lambda s: wrong_imports(s, "gateway"), "from worker.job import x", "import fastapi"),
        (lambda s: wrong_imports(s, "worker"), "from fastapi import FastAPI", "import torch"),
        (lambda s: wrong_imports(s, "worker"), "from gateway import sse", "import arq"),
        (lambda s: wrong_imports(s, "shared"), "import httpx", "import asyncio, redis.asyncio"),
        (lambda s: wrong_imports(s, "shared"), "from worker import job", "from shared import keys"),
        (torch_on_import, "try:\n    import torch\nexcept ImportError: pass", INSIDE),
        (torch_on_import, "class A:\n    from transformers import B", TYPES),
        (long_functions, LONG, LONG.replace("    x = 1\n", "", 1)),
        (long_functions, LONG.replace("def", "async def"), "x = 1\n" * 100),
        (environment_reads, "import os\nos.environ['A']", "import os\nos.getpid()"),
        (environment_reads, "import os as o\no.getenv('A')", "x.environment"),
        (environment_reads, "from os import environ", "from os import path"),
        (key_literals, "k = 'unbroken:queue'", "log = getLogger('unbroken.queue')"),
        (key_literals, "k = f'unbroken:{x}'", "k = f'{keys.SESSION}{x}'"),
        (key_literals, "k = 'arq:job:' + x", "'see arq: its queue'"),
        (lua_faults, "return 1", "-- Nothing changes.\nreturn 1"),
        (lua_faults, "-- Bad.\nreturn redis.call('GET', 'unbroken:x')", "-- unbroken:x\nreturn 1"),
    ],
)
def test_each_rule_can_be_broken(check: Callable[[str], object], bad: str, good: str) -> None:
    """A rule that cannot fail guards nothing."""
    assert check(bad)
    assert not check(good)
