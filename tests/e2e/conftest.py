"""End-to-end tests start whole stacks in their fixtures: that time is theirs as well."""

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.stack import ROOT

STACK_SECONDS = 180
JS_SOURCES = Path(__file__).with_name("js")


def pytest_collection_modifyitems(items):
    for item in items:
        if "e2e" in item.path.parts and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(STACK_SECONDS))


@pytest.fixture(scope="session")
def js():
    """A folder with the clients' packages, kept between runs, and our files; its path."""
    lock = (JS_SOURCES / "package-lock.json").read_bytes()
    folder = ROOT / ".cache" / "clients" / f"js-{hashlib.sha256(lock).hexdigest()[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    for source in (*JS_SOURCES.iterdir(), *(ROOT / "clients" / "js").iterdir()):
        shutil.copy(source, folder)
    if not (folder / "complete").exists():
        argv = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        done = subprocess.run(argv, cwd=folder, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        (folder / "complete").touch()
    return folder
