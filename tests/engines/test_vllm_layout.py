"""Whatever changes the bytes of vLLM's KV changes the layout's fingerprint, and nothing else does.

Configurations of vLLM's own, and its own code that hands them to the connector; no engine runs.
"""

import json
import subprocess
from pathlib import Path

import pytest

from support.engines import engine_environment, engine_python
from support.vllmlayouts import CHANGES, SAME
from support.vllms import ENVIRONMENT, random_model

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module", params=["vllm", "vllm33"])
def fingerprints(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """Of the engine as it is (""), and by what was changed."""
    engine, base = request.param, tmp_path_factory.mktemp("models")
    models: list[Path] = []
    for seed in (0, 1):  # both of one name
        (base / str(seed)).mkdir()
        models.append(random_model(engine, base / str(seed) / "tiny", seed))
    done = subprocess.run(
        [engine_python(engine), "-m", "support.vllmlayouts", *models],
        env=engine_environment(**ENVIRONMENT), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_the_bytes_of_kv_is_another_layout(
    fingerprints: dict[str, str], name: str
) -> None:
    others = [each for each in ("", *CHANGES) if fingerprints[each] == fingerprints[name]]
    assert others == [name]


@pytest.mark.parametrize("name", SAME)
def test_what_does_not_is_the_same_layout(fingerprints: dict[str, str], name: str) -> None:
    assert fingerprints[name] == fingerprints[SAME[name][0]]
