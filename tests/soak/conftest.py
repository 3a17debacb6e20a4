"""Fixtures of the load tests: a chat template, and requests with their answers."""

from pathlib import Path

import pytest

from tests.models import HERMES_TEMPLATE
from tests.soak.drawn_requests import RequestSource, request_source
from weights.checkpoints.checkpoint import load_model

SEED = 22


@pytest.fixture(scope="session")
def chat_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat template that adds no special tokens."""
    file = tmp_path_factory.mktemp("templates") / "hermes.jinja"
    file.write_text(HERMES_TEMPLATE)
    return file


@pytest.fixture(scope="session")
def source(memory_plus_folder: Path) -> RequestSource:
    """Requests to the tiny Memory+ model; computing the answers takes some seconds."""
    model, _ = load_model(memory_plus_folder)
    return request_source(model, SEED)
