"""The OpenAPI document is complete, and the server keeps to it whatever it is sent."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.server.http.test_app import build


def no_internal_error(context, response, case):
    # 503 and 504 are answers that a request may ask for, such as by its timeout
    assert response.status_code != 500


CHECKS = (
    no_internal_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
)
OPERATIONS = [
    ("/v1/completions", "POST"),
    ("/v1/chat/completions", "POST"),
    ("/v1/models", "GET"),
    ("/v1/models/{name}", "GET"),
    ("/v1/memory", "GET"),
    ("/v1/memory/patches", "GET"),
    ("/v1/memory/patches", "POST"),
    ("/v1/memory/patches/{name}", "DELETE"),
    ("/tokenize", "POST"),
    ("/detokenize", "POST"),
    ("/health", "GET"),
    ("/ready", "GET"),
    ("/version", "GET"),
    ("/metrics", "GET"),
]


@pytest.fixture(scope="session")
def document(memory_server):
    return schemathesis.openapi.from_url(f"{memory_server.url}/openapi.json")


def check(operation, count):
    """Send ``count`` drawn requests, valid and not, and check each answer with the document."""
    modes = list(GenerationMode)

    @settings(max_examples=count, suppress_health_check=list(HealthCheck))
    @given(case=st.one_of([operation.as_strategy(generation_mode=mode) for mode in modes]))
    def send(case):
        case.call_and_validate(checks=CHECKS)

    send()


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_no_request_gets_an_undocumented_answer(document, path, method):
    check(document[path][method], 50)


# the other operations take no parameters, so that more requests say no more
WITH_PARAMETERS = [(path, how) for path, how in OPERATIONS if how == "POST" or "{" in path]


@pytest.mark.slow
@pytest.mark.parametrize(("path", "method"), WITH_PARAMETERS)
def test_many_requests_get_no_undocumented_answer(document, path, method):
    check(document[path][method], 300)


def fields(value, path=""):
    """Path and schema of every property in the document."""
    if isinstance(value, dict):
        for name, schema in value.get("properties", {}).items():
            yield f"{path}.{name}", schema
        for name, part in value.items():
            yield from fields(part, f"{path}/{name}")
    elif isinstance(value, list):
        for part in value:
            yield from fields(part, path)


def test_every_field_and_operation_is_described():
    *_, app = build()
    document = app.openapi()
    operations = [(p, m.upper()) for p, ms in document["paths"].items() for m in ms]
    assert sorted(operations) == sorted(OPERATIONS)
    described = list(fields(document["components"]["schemas"]))
    assert len(described) > 100
    assert [path for path, schema in described if not schema.get("description")] == []
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert operation["summary"], (method, path)
            assert {"200", "401", "500", "503"} <= operation["responses"].keys()
            assert "422" not in operation["responses"]
            if method == "post":
                assert {"400", "413"} <= operation["responses"].keys()
