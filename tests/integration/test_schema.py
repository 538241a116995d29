"""Whatever the schema allows, and much that it does not, gets an answer of the contract."""

import hypothesis
import pytest
import schemathesis
from schemathesis import GenerationMode
from schemathesis.config import SchemathesisConfig

from tests.gateway_process import GatewayProcess

EXAMPLES = 10
SEED = 20261122


@pytest.fixture
def gateway(redis_url, tmp_path):
    """A gateway at an empty Redis: with another test's worker there, requests would wait."""
    gateway = GatewayProcess(redis_url, tmp_path)
    yield gateway
    gateway.stop()


@pytest.mark.timeout(120)
def test_generated_requests_get_answers_of_the_contract(gateway):
    """No generated request is an unexpected failure; each error has the contract's shape."""
    config = SchemathesisConfig()
    config.projects.default.generation.update(modes=list(GenerationMode))
    schema = schemathesis.openapi.from_url(f"{gateway.url}/openapi.json", config=config)
    seen = set()
    for found in schema.get_all_operations():
        operation = found.ok()
        seen.add(operation.label)

        @hypothesis.seed(SEED)
        @hypothesis.settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(case=operation.as_strategy())
        def check(case):
            check_answer(case.call(timeout=10))

        check()
    assert {"POST /v1/chat/completions", "GET /v1/sessions/{session_id}/events"} <= seen
    assert gateway.process.poll() is None


def check_answer(answer):
    assert answer.status_code < 500 or answer.status_code == 503, answer.text
    assert answer.headers["x-request-id"][0].startswith("req_")
    if answer.status_code >= 400 and answer.request.method != "HEAD":
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert len(answer.content) <= 8192
        assert "Traceback" not in answer.text
