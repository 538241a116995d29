"""The dashboard and the alerts ask for metrics that exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml

from shared import metrics

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
NAME = re.compile(r"\b(?:unbroken|vllm|http)[_:][a-z0-9_]+")
SUFFIXES = {
    "counter": ("_total",),
    "gauge": ("",),
    "histogram": ("_bucket", "_sum", "_count"),
}


def dashboard() -> list[str]:
    """Return the queries of all panels."""
    text = (DEPLOY / "grafana" / "dashboards" / "unbroken.json").read_text()
    panels = json.loads(text)["panels"]
    return [t["expr"] for panel in panels for t in panel.get("targets", [])]


def alerts() -> list[str]:
    """Return the conditions of all alerts."""
    text = (DEPLOY / "prometheus" / "alerts.yml").read_text()
    return [rule["expr"] for group in yaml.safe_load(text)["groups"] for rule in group["rules"]]


def exported() -> set[str]:
    """Return the names of all series of gateway and worker."""
    families = [f for registry in (metrics.GATEWAY, metrics.WORKER) for f in registry.collect()]
    return {f.name + suffix for f in families for suffix in SUFFIXES.get(f.type, ())}


def unknown(queries: list[str], names: set[str]) -> set[str]:
    asked = {name for query in queries for name in NAME.findall(query)}
    return {name for name in asked if name not in names and name != "http_response_status_code"}


def test_what_is_asked_for_is_exported() -> None:
    """Each metric in a panel or an alert is one of the gateway's or the worker's."""
    assert len(dashboard()) > 20
    assert len(alerts()) > 5
    assert unknown(dashboard() + alerts(), exported()) == set()
    assert unknown(["rate(unbroken_nothing_total[5m])"], exported()) == {"unbroken_nothing_total"}


def test_the_dashboard_shows_what_is_measured() -> None:
    """Latency, throughput, queue, cache, takeovers, errors: none is left out."""
    text = " ".join(dashboard())
    for name in (
        "vllm:time_to_first_token_seconds",
        "vllm:generation_tokens_total",
        "unbroken_queue_depth",
        "vllm:kv_cache_usage_perc",
        "unbroken_takeovers_total",
        "unbroken_errors_total",
    ):
        assert name in text
