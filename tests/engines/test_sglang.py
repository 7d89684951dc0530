"""SGLang with a warehouse below it: its contracts hold, and the engine gets the right tokens.

Real packages in an environment of their own (`./run test-engines sglang`), real processes; what has
CUDA builds only, and is never called on a CPU, is a stub there.
"""

import subprocess
from pathlib import Path
from typing import Final

import pytest

from support.daemon import Daemon, running_daemon
from support.engines import check_inside, engine_environment, engine_python, until_stored
from support.sglangs import PAGE_TOKENS, Sglang, linker_config
from support.snippets import snippets_of
from twfs.units import ALIGN

ENGINE: Final = "sglang"
pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

INSIDE: Final = Path(__file__).parent / "inside"
PAGES: Final = 9
PROMPT: Final = {"seed": 1, "tokens": PAGE_TOKENS * PAGES + 20}


def test_the_adapters_hold_sglangs_contracts(scratch: Path) -> None:
    check_inside(ENGINE, INSIDE / "sglang_storage.py", scratch, SGLANG_USE_CPU_ENGINE="1")


def flip_a_byte(daemon: Daemon) -> None:
    """Change one byte of a stored block where it lies."""
    with daemon.client(arena_bytes=0) as client:
        (info,) = client.models()
        (head, *_) = client.heads(info.id)
        extent = client.chain_of(info.id, head)[0].block.extents[0]
    with (daemon.directory / "device0.img").open("r+b") as file:
        file.seek(extent.offset + ALIGN + 50)
        byte = file.read(1)[0]
        file.seek(extent.offset + ALIGN + 50)
        file.write(bytes([byte ^ 8]))


def test_tokens_are_the_same_cold_warm_after_a_restart_and_after_failures(
    scratch: Path, model: Path
) -> None:
    with running_daemon(scratch / "warehouse") as daemon:
        config = linker_config(daemon.socket)
        with Sglang(model, config) as engine:
            cold = engine.generate(PROMPT, out=4)
            assert cold["cached"] == [0]
            until_stored(daemon, PAGES)
            assert engine.ask(do="flush")
            warm = engine.generate(PROMPT, out=4)
            assert (warm["tokens"], warm["cached"]) == (cold["tokens"], [PAGE_TOKENS * PAGES])
            other = engine.generate({**PROMPT, "seed": 2}, out=4)
            assert other["tokens"] != cold["tokens"]  # the model does look at its prompt
        daemon.restart()
        with Sglang(model, config) as engine:
            again = engine.generate(PROMPT, out=4)
            assert (again["tokens"], again["cached"]) == (cold["tokens"], [PAGE_TOKENS * PAGES])
            flip_a_byte(daemon)
            for seed in (1, 2):  # one of both has the byte
                engine.ask(do="flush")
                answer = engine.generate({**PROMPT, "seed": seed}, out=4)
                assert answer["tokens"] == (cold if seed == 1 else other)["tokens"]
                assert answer["finish"] == ["length"]
            daemon.kill()
            engine.ask(do="flush")
            alone = engine.generate(PROMPT, out=4)
            assert (alone["tokens"], alone["cached"]) == (cold["tokens"], [0])
            daemon.start()
        with Sglang(model, config, dtype="float32") as engine:
            assert engine.generate(PROMPT, out=4)["cached"] == [0]


def test_the_pages_commands_are_understood_by_sglang() -> None:
    """Every option of the page's commands, and the classes that its configurations name."""
    text = "\n".join(snippets_of("sglang.md", "sh"))
    options = {word for word in text.split() if word.startswith("--")}
    assert len(options) > 8
    source = (
        "import sys, argparse\n"
        "from sglang.srt.server_args import ServerArgs\n"
        "parser = argparse.ArgumentParser()\n"
        "ServerArgs.add_cli_args(parser)\n"
        "known = {each for action in parser._actions for each in action.option_strings}\n"
        "print(sorted(set(sys.argv[1:]) - known))\n"
        "from twfs.engines.sglang import TwfsHiCache\n"
        "from twfs.engines.sglang_linker import TwfsLinker\n"
    )
    done = subprocess.run(
        [engine_python(ENGINE), "-c", source, *sorted(options)], capture_output=True, text=True,
        check=True, env=engine_environment(SGLANG_USE_CPU_ENGINE="1"),
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "[]"
