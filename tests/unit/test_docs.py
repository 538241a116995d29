"""The documents agree with the code."""

from __future__ import annotations

import ast
import datetime as dt
import re
import subprocess
from pathlib import Path

import pytest
import yaml

import run
from shared.settings import GatewaySettings, WorkerSettings

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {name.upper() for s in (GatewaySettings, WorkerSettings) for name in s.model_fields}
COMPOSE = {  # what the compose files alone ask for, with its default
    name: default
    for path in sorted(ROOT.glob("docker-compose*.yml"))
    for name, default in re.findall(r"\$\{([A-Z_]+):?-([^{}]*)\}", path.read_text())
    if name not in SETTINGS
}

CODE_LINK = re.compile(r"\[(\w+)\.(\w+) ([^\]]+)\]\(([^)#]+?\.\w+)(?::(\d+)|#L(\d+))\)")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE_BLOCK = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
DAY = re.compile(r"\b\d{4}-\d{2}-\d{2}\b")
COMMIT = re.compile(r"(?:`|[Cc]ommit `?)([0-9a-f]{7,40})\b")
MACHINE_PATHS = re.compile(r"(?<![\w.])/(?:work|farm|root|home/\w+|Users)/")


def tracked() -> list[Path]:
    """Return the files of the repository; in a folder without git, all that are not hidden."""
    if (ROOT / ".git").exists():
        argv = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
        listed = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        paths = [ROOT / name for name in listed.split("\0") if name]
    else:
        paths = [p for p in ROOT.rglob("*") if not re.search(r"/\.|__pycache__", str(p))]
    return [path for path in paths if path.is_file()]


def documents() -> list[Path]:
    return [path for path in tracked() if path.suffix == ".md"]


def env_names(text: str) -> list[str]:
    """Return the variables of an example file, commented out or not."""
    return re.findall(r"^#?([A-Z][A-Z0-9_]*)=", text, re.MULTILINE)


def table_names(text: str) -> list[str]:
    """Return the variables of a document's configuration table: the first column, in backticks."""
    return re.findall(r"^\| *`([A-Z][A-Z0-9_]*)` *\|", text, re.MULTILINE)


def progress_log(text: str) -> str:
    """Return the section that is named Progress Log."""
    found = re.search(r"^(#+) Progress Log\s*$(.*?)(?=^\1 |\Z)", text, re.DOTALL | re.MULTILINE)
    assert found, "CLAUDE.md has no section Progress Log"
    return found[2]


def defines(source: str, name: str) -> bool:
    """Whether a module defines a function, class, method or constant of this name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            if node.name == name:
                return True
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id == name:
            return True
    return False


def bad_code_links(text: str, root: Path = ROOT) -> list[str]:
    """Return the links into the code whose file, line or name does not exist."""
    faults = []
    for match in CODE_LINK.finditer(text):
        name = match[3].split("(")[0].strip().rpartition(".")[2]
        path, line = root / match[4], int(match[5] or match[6])
        source = path.read_text() if path.is_file() else ""
        known = defines(source, name) if path.suffix == ".py" else name in source
        if not known or line > source.count("\n") + 1:
            faults.append(match[0])
    return faults


def broken_links(text: str, folder: Path) -> list[str]:
    """Return the relative links that lead nowhere."""
    targets = LINK.findall(CODE_BLOCK.sub("", text))
    local = [t for t in targets if not re.match(r"[a-z]+:|#", t)]
    return [t for t in local if not (folder / re.sub(r"(#.*|:\d+)$", "", t)).exists()]


def default_text(value: object) -> str:
    return "" if value is None else str(int(value)) if isinstance(value, bool) else f"{value}"


def test_the_example_file_names_each_setting_with_its_default() -> None:
    """`.env.example` lists the settings, each once, as they are without it."""
    text = (ROOT / ".env.example").read_text()
    assert sorted(env_names(text)) == sorted([*SETTINGS, *COMPOSE])
    fields = {**GatewaySettings.model_fields, **WorkerSettings.model_fields}
    for name, shown in re.findall(r"^#?([A-Z][A-Z0-9_]*)=(.*)$", text, re.MULTILINE):
        field = fields.get(name.lower())
        default = default_text(field.default) if field else COMPOSE[name]
        assert shown == default.removesuffix(".0"), name


def test_the_readme_documents_each_setting() -> None:
    """The README's configuration table lists the settings, each once."""
    names = table_names((ROOT / "README.md").read_text())
    assert sorted(names) == sorted([*SETTINGS, *COMPOSE])


def test_each_container_gets_its_settings_and_no_others() -> None:
    """The compose file passes on what a part reads, and nobody else's secrets."""
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    for name, settings in (("gateway", GatewaySettings), ("worker", WorkerSettings)):
        passed = set(services[name]["environment"])
        own = {field.upper() for field in settings.model_fields} - {"RUN_STATE_PATH"}  # run.py's
        assert passed == own, name


def test_the_progress_log_points_to_code_that_exists() -> None:
    """Each link of the log names a function, class or constant of the file that it leads to."""
    log = progress_log((ROOT / "CLAUDE.md").read_text())
    assert CODE_LINK.search(log)
    assert bad_code_links(log) == []


def test_the_progress_log_has_dates() -> None:
    """The log says when; its days are real, and none lies ahead."""
    days = DAY.findall(progress_log((ROOT / "CLAUDE.md").read_text()))
    assert days
    tomorrow = dt.datetime.now(dt.timezone.utc).date() + dt.timedelta(days=1)
    assert all(dt.date.fromisoformat(day) <= tomorrow for day in days)


def test_the_progress_log_names_commits_that_exist() -> None:
    """Each commit that the log names is part of the history."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    hashes = COMMIT.findall(progress_log((ROOT / "CLAUDE.md").read_text()))
    for commit in hashes:
        argv = ["git", "cat-file", "-e", f"{commit}^{{commit}}"]
        assert subprocess.run(argv, cwd=ROOT, capture_output=True).returncode == 0, commit


def test_links_between_documents_lead_somewhere() -> None:
    """Each relative link of a document leads to a file."""
    found = documents()
    assert found
    assert not {p.name: bad for p in found if (bad := broken_links(p.read_text(), p.parent))}


def test_nothing_names_a_path_of_some_machine() -> None:
    """The repository makes sense on any machine; a Dockerfile's paths are those of its image."""
    own = Path(__file__)
    for path in tracked():
        text = "" if path == own or path.name == "Dockerfile" else path.read_text(errors="ignore")
        if found := MACHINE_PATHS.search(text):
            pytest.fail(f"{path.relative_to(ROOT)}: {found[0]}")


def test_each_check_can_fail(tmp_path: Path) -> None:
    """A check that finds nothing wrong anywhere checks nothing."""
    (tmp_path / "a.py").write_text("LIMIT = 1\n\nclass A:\n    async def go(self): ...\n")
    good = "[Python.function go()](a.py:4) [Python.class A](a.py:3) [Python.constant LIMIT](a.py:1)"
    bad = "[Python.function went()](a.py:4) [Python.class A](a.py:30) [Python.class A](b.py:1)"
    assert bad_code_links(good, tmp_path) == []
    assert len(bad_code_links(bad, tmp_path)) == 3
    assert broken_links("[x](a.py) [y](https://a.b/c) [z](#top) [w](a.py#L3)", tmp_path) == []
    assert broken_links("[x](gone.py)", tmp_path) == ["gone.py"]
    assert env_names("#A=1\nB=2\n# C is no variable\n") == ["A", "B"]
    assert table_names("| `PORT` | 3000 |\n| plain | x |") == ["PORT"]
    assert progress_log("## Progress Log\n### 2025-01-01 x\n## Next\ny") == "\n### 2025-01-01 x\n"
    assert COMMIT.findall("`0123abc`, commit 89abcdef and the word decade") == [
        "0123abc",
        "89abcdef",
    ]
    assert MACHINE_PATHS.search("see /work/x")
    assert not MACHINE_PATHS.search("see https://a.b/work/x or docs/work/x")


def test_run_py_knows_the_drain_time() -> None:
    """The supervisor, which has no packages, waits as long as the parts drain by default."""
    assert float(run.DRAIN_SECONDS) == WorkerSettings.model_fields["drain_seconds"].default
    assert float(run.DRAIN_SECONDS) == GatewaySettings.model_fields["drain_seconds"].default
