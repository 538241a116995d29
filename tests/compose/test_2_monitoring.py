"""Prometheus scrapes the stack, its rules are sound, and the dashboard's queries have answers."""

from __future__ import annotations

import json
import urllib.parse
import urllib.request
from typing import Any

from tests.compose.kit import Compose, docker, wait_until
from tests.stack import ROOT
from tests.unit.test_monitoring import dashboard

DEPLOY = ROOT / "deploy" / "prometheus"
IMAGE = "prom/prometheus:v3.5.0"


def promtool(*argv: str) -> str:
    """Run promtool on the rules, with their tests beside them."""
    files = [*DEPLOY.glob("*.yml"), ROOT / "tests/compose/alerts_test.yml"]
    mounts = [f"--volume={path}:/rules/{path.name}:ro" for path in files]
    options = ["--rm", "--workdir=/rules", "--entrypoint=promtool"]
    return docker("run", *options, *mounts, IMAGE, *argv)


def test_each_alert_fires_when_it_should(built: Compose) -> None:
    """Promtool accepts configuration and rules, and plays through what they watch for."""
    promtool("check", "config", "prometheus.yml")
    promtool("test", "rules", "alerts_test.yml")


def test_prometheus_finds_all_parts(compose: Compose, expected) -> None:
    """Each gateway, each worker and the proxy is scraped; the panels have data, no alert fires."""
    compose("--profile=monitoring", "up", "--detach", "--no-deps", "prometheus")
    try:
        address = compose("port", "prometheus", "9090").strip()

        def ask(path: str, **query: str) -> Any:
            url = f"http://{address}/api/v1/{path}?{urllib.parse.urlencode(query)}"
            with urllib.request.urlopen(url, timeout=10) as answer:
                return json.load(answer)["data"]

        def found() -> bool:
            try:
                active = ask("targets")["activeTargets"]
            except OSError:
                return False
            up = sorted(t["labels"]["job"] for t in active if t["health"] == "up")
            return up == ["gateway", "gateway", "proxy", "worker", "worker"]

        wait_until(found, "all targets are up", 180)

        def empty() -> list[str]:
            asked = [q.replace("$__rate_interval", "1m") for q in dashboard()]
            answers = {q: ask("query", query=q)["result"] for q in asked}  # a wrong one is a 400
            return [q for q, found in answers.items() if not found and "[1m]" not in q]

        wait_until(lambda: not empty(), "each gauge of the dashboard has a value", 180)
        assert [a for a in ask("alerts")["alerts"] if a["state"] == "firing"] == []
    finally:
        compose("--profile=monitoring", "rm", "--stop", "--force", "prometheus")
