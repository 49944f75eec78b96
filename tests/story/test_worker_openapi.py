"""schemathesis against the wrapper's own OpenAPI: nothing it can think of makes a 5xx, but a justified 503 or 507."""

from __future__ import annotations

import anyio
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings

from comfyfleet.testing.processes import standalone_worker

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]
JUSTIFIED = {503, 507}
CHECKS = list(HealthCheck)


@pytest.fixture(scope="module")
def wrapper(tmp_path_factory):
    worker = standalone_worker(tmp_path_factory.mktemp("worker"))
    worker.start()
    try:
        anyio.run(worker.until, "/health")
        yield worker
    finally:
        worker.stop()


def operations(url):
    return [found.ok() for found in schemathesis.openapi.from_url(f"{url}/openapi.json").get_all_operations()]


def test_no_request_makes_the_wrapper_fail(wrapper):
    tried = []
    for operation in operations(wrapper.base_url):

        @settings(
            max_examples=20, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
        )
        @given(case=operation.as_strategy())
        def holds(case):
            response = case.call(timeout=30)
            tried.append(case.path)
            assert response.status_code < 500 or response.status_code in JUSTIFIED, response.text
            if response.status_code == 503:
                assert response.headers.get("Retry-After") or case.path == "/health"

        holds()
    assert {"/generate", "/generate/sync", "/generate/stream", "/result/{job_id}", "/queue-info"} <= set(tried)


def test_it_is_still_ready_afterwards(wrapper):
    assert requests.get(f"{wrapper.base_url}/health", timeout=10).status_code == 200
