"""The `twfs` command: wires the subcommands, and turns every error into one sentence and a code.

Parses and prints only. A bug of ours shows its traceback; so does everything under TWFS_DEBUG=1.
"""

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated, Final

import typer

from twfs.errors import TwfsError
from twfs_tools import bench
from twfs_tools.advise import advise
from twfs_tools.check import check
from twfs_tools.create import create
from twfs_tools.device import app as device_app
from twfs_tools.du import du
from twfs_tools.evict import evict
from twfs_tools.explain import explain
from twfs_tools.ls import ls
from twfs_tools.model import app as model_app
from twfs_tools.output import JsonFlag, complain
from twfs_tools.purge import purge
from twfs_tools.rebuild import rebuild
from twfs_tools.replay import replay
from twfs_tools.retain import pin, retain
from twfs_tools.scrub import scrub
from twfs_tools.serve import mount, serve, unmount
from twfs_tools.status import status
from twfs_tools.tenant import app as tenant_app

EXIT_INTERRUPTED: Final = 130
EXIT_PIPE: Final = 141  # as a program that SIGPIPE ended
# typer carries a click of its own or uses an installed one: this is whichever it raises.
USAGE_ERRORS: Final = tuple(
    kind for kind in typer.BadParameter.__mro__
    if issubclass(kind, Exception) and kind.__name__ == "ClickException"
)  # fmt: skip

app = typer.Typer(
    help="twfs: a token warehouse. Keeps the KV cache of LLM inference on NVMe.",
    rich_markup_mode=None,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    create, serve, mount, unmount, status, ls, du, advise, evict, purge, explain, pin, retain,
    check, scrub, rebuild, replay,
):  # fmt: skip
    app.command(command.__name__)(command)
app.add_typer(model_app, name="model")
app.add_typer(device_app, name="device")
app.add_typer(tenant_app, name="tenant")
app.add_typer(bench.app, name="bench")


@app.command()
def demo(
    directory: Annotated[
        Path | None, typer.Argument(help="Where to put the warehouse; default a temporary place.")
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", help="Length of the prompt.")] = 8192,
    plot: Annotated[Path, typer.Option("--plot", help="The plot to write.")] = Path(
        "demo-out/ttft.png"
    ),
    *,
    quick: Annotated[bool, typer.Option("--quick", help="A smaller model, fewer rounds.")] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the warehouse for a look.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Save a real model's KV cache, load it into a fresh process, compare, and plot the times."""
    from twfs_tools.demo import run_demo  # noqa: PLC0415 - torch and transformers take seconds

    run_demo(directory=directory, tokens=tokens, plot=plot, quick=quick, keep=keep, as_json=as_json)


def main() -> None:
    """Run the command that sys.argv names; always ends by SystemExit, also on SIGTERM."""
    signal.signal(signal.SIGTERM, _end)
    sys.exit(run(sys.argv[1:]))


def _end(number: int, _: FrameType | None) -> None:
    """End by unwinding, so that scratch is removed and daemons of benchmarks are ended."""
    raise SystemExit(128 + number)


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code; what an operator did wrong is one line."""
    if os.environ.get("TWFS_DEBUG") == "1":
        return _invoke(arguments)
    code = EXIT_INTERRUPTED
    try:
        code = _invoke(arguments)
    except TwfsError as error:
        complain(str(error))
        code = error.exit_code
    except USAGE_ERRORS as error:
        message = getattr(error, "format_message", error.__str__)()
        complain(f"{message.rstrip('.')}; twfs --help tells more")
        code = 2
    except BrokenPipeError:
        _quieten()
        code = EXIT_PIPE
    except OSError as error:
        where = f"{error.filename}: " if error.filename is not None else ""
        complain(f"{where}{error.strerror or error}")
        code = 1
    except (KeyboardInterrupt, typer.Abort):
        pass
    return code


def _invoke(arguments: list[str]) -> int:
    """Parse and run; return the code of typer.Exit, or 0."""
    code = typer.main.get_command(app).main(arguments, prog_name="twfs", standalone_mode=False)
    sys.stdout.flush()
    return code if isinstance(code, int) else 0


def _quieten() -> None:
    """Keep the interpreter from complaining about the closed pipe at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
