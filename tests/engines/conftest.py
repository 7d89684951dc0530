"""What tests of real engines share: which engine, a random model for it, a daemon.

A module names its engine as ENGINE; without that it is vLLM 0.32.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.daemon import Daemon, running_daemon
from support.vllms import DEVICE_BYTES, random_model

pytest.register_assert_rewrite("support.lostfiles")


@pytest.fixture(scope="module")
def engine(request: pytest.FixtureRequest) -> str:
    """The environment in which the module's tests run."""
    return str(getattr(request.module, "ENGINE", "vllm"))


@pytest.fixture(scope="module")
def model(engine: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a small model."""
    return random_model(engine, tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def daemon(scratch: Path) -> Iterator[Daemon]:
    """A daemon with room for all that a test stores."""
    with running_daemon(scratch / "w", device_bytes=DEVICE_BYTES) as running:
        yield running


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where what the engines themselves say goes in this test."""
    path = tmp_path / "log"
    monkeypatch.setattr("support.asking.LOG", str(path))
    return path
