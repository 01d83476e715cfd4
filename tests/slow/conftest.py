"""Suites that take minutes, or need what few have: `pytest -m slow`, by their own nox sessions."""

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import emulated
import pytest
from served_models import build_served_models
from vllm_server import vllm_server


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where an emulated GPU has been compiled, for `emulated.run`."""
    if reason := emulated.why_not():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("gpu")
    emulated.build(folder)
    return folder


@pytest.fixture(scope="session")
def vllm_models(tmp_path_factory: pytest.TempPathFactory):
    """A target that vLLM can serve, and heads of all families that know some of its answers.

    `place` holds target/, and for each family NAME/heads/ and NAME/export/.
    """
    if find_spec("vllm") is None:
        pytest.skip("vLLM is not installed: nox -s vllm")
    return build_served_models(tmp_path_factory.mktemp("vllm"))


@pytest.fixture(scope="session")
def vllm_url(vllm_models) -> Iterator[str]:
    """The address of a vLLM server with hydra heads; its model is called "served"."""
    speculative = {
        "method": "mtp",
        "model": str(vllm_models.place / "hydra" / "export"),
        "num_speculative_tokens": 3,
    }
    log = vllm_models.place / "server.log"
    options = ("--speculative-config", json.dumps(speculative))
    with vllm_server(vllm_models.place / "target", log, *options) as url:
        yield url


@pytest.fixture(scope="session")
def plain_vllm_url(vllm_models) -> Iterator[str]:
    """The address of a vLLM server of the same model without heads."""
    log = vllm_models.place / "plain.log"
    with vllm_server(vllm_models.place / "target", log) as url:
        yield url
