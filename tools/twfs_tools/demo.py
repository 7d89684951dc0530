"""`twfs demo`: KV that one process saved answers a prompt in another, compared bit by bit.

Starts real processes: a daemon with a mount, two engines (demo_agent.py), and the commands that an
operator would type. Leaves nothing behind but the plot, whatever happens. One thread.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, Final, NoReturn

from rich.console import Console
from rich.table import Table

from twfs.errors import EqualityFailed, InvalidInput, TwfsError
from twfs_tools.demo_model import COMPUTED, THREADS, Plan
from twfs_tools.output import print_json, size
from twfs_tools.process import daemon_command, start_daemon, stop
from twfs_tools.target import find_mount

DIFFERENCE_MAX: Final = 1e-3  # of a logit in float32 against a recompute, which adds up otherwise
TOKENS_MAX: Final = 65_536
QUICK_TOKENS_MAX: Final = 1024
LISTED_MAX: Final = 14  # lines shown of each command
EXIT_TERMINATED: Final = 128 + signal.SIGTERM


def run_demo(
    *,
    directory: Path | None,
    tokens: int,
    plot: Path,
    quick: bool,
    as_json: bool,
    keep: bool = False,
) -> None:
    """Save, end everything, load, compare, measure, and write *plot*.

    The warehouse is made in *directory* and stays there; without one it is temporary unless *keep*.
    EqualityFailed if a single bit of the KV or of the logits on it differs, or a token does.
    """
    blocks_tokens = 64 if quick else 256
    tokens = min(tokens, QUICK_TOKENS_MAX) if quick else tokens
    tokens -= tokens % (8 * blocks_tokens)
    if not 8 * blocks_tokens <= tokens <= TOKENS_MAX:
        raise InvalidInput(f"--tokens must be {8 * blocks_tokens} to {TOKENS_MAX}")
    with ExitStack() as cleanup:
        cleanup.enter_context(_terminated_as_interrupted())
        work = Path(tempfile.mkdtemp(prefix="twfs-demo-"))
        kept = keep and directory is None
        if not kept:
            cleanup.callback(shutil.rmtree, work, ignore_errors=True)
        plan = Plan(
            tokens=tokens,
            block_tokens=blocks_tokens,
            quick=quick,
            socket=str((directory or work / "warehouse").absolute() / "socket"),
            reference=str(work / "reference.pt"),
        )
        demo = _Demo(plan, work, plot, as_json=as_json)
        demo.run()
        if kept or directory is not None:
            demo.console.print(f"the warehouse is kept in {demo.warehouse}", soft_wrap=True)


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Let SIGTERM unwind as an exception, so that everything is cleaned up."""

    def end(_number: int, _frame: FrameType | None) -> NoReturn:
        sys.exit(EXIT_TERMINATED)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Demo:
    """One run: what it does in order, what it prints, and the figures it collects."""

    def __init__(self, plan: Plan, work: Path, plot: Path, *, as_json: bool) -> None:
        self.plan = plan
        self.warehouse = Path(plan.socket).parent
        self.mountpoint = work / "tw"
        self.plot = plot
        self.console = Console(quiet=as_json, highlight=False)
        self.as_json = as_json
        self.figures: dict[str, Any] = {
            "tokens": plan.tokens, "block_tokens": plan.block_tokens, "quick": plan.quick,
            "threads": THREADS, "turns": [], "timings": [], "commands": {},
        }  # fmt: skip

    def run(self) -> None:
        """Tell the story from an empty warehouse to the plot."""
        self._title("1. A warehouse, a daemon, a mount")
        self.mountpoint.mkdir()
        self.warehouse.parent.mkdir(parents=True, exist_ok=True)
        self._twfs("create", str(self.warehouse), "--size", "256M" if self.plan.quick else "2G")
        with self._daemon():
            self._title("2. A process with a model lives through two agent sessions, and ends")
            self._engine("save")
        self._say("The engine has ended, and the daemon too. Both start anew.")
        with self._daemon():
            self._title("3. Another process answers the next prompt from the saved KV")
            self._engine("answer")
            self._judge()
            self._title("4. What an operator sees")
            self._look()
        self._title("5. The checker reads every payload")
        self._twfs("check", str(self.warehouse), "--data")
        self._title("6. Time to first token")
        self._show_timings()
        draw(self.plot, self.figures)
        self._say(f"plot: {self.plot}")
        if self.as_json:
            print_json(self.figures)

    def _title(self, text: str) -> None:
        """Begin a part of the story."""
        self.console.print(f"\n[bold]{text}[/bold]")

    def _say(self, text: str, style: str = "") -> None:
        """Print a line as it is, however long."""
        self.console.print(text, style=style, markup=False, soft_wrap=True)

    def _shown(self, command: list[str], output: str) -> None:
        """Print a command and what it said, and keep both."""
        line = shlex.join(command)
        self.figures["commands"][line] = output
        self._say(f"$ {line}", "cyan")
        lines = output.rstrip("\n").splitlines()
        for each in lines[:LISTED_MAX]:
            self._say(f"  {each}")
        if len(lines) > LISTED_MAX:
            self._say(f"  ... {len(lines) - LISTED_MAX} more lines", "dim")

    def _twfs(self, *arguments: str) -> None:
        """Run a `twfs` command as a process of its own and show it; its error is ours."""
        command = [sys.executable, "-m", "twfs_tools.cli", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise _error_of(done.returncode, done.stderr)
        self._shown(["twfs", *arguments], done.stdout)

    @contextmanager
    def _daemon(self) -> Iterator[None]:
        """Run the daemon with the mount for the time of the block."""
        command = daemon_command(self.warehouse, self.mountpoint)
        try:
            daemon = start_daemon(command, self.warehouse / "daemon.log")
            self._say(f"daemon {daemon.pid} serves {self.mountpoint} and {self.plan.socket}")
            try:
                yield
            finally:
                stop(daemon)
        finally:
            if find_mount(self.mountpoint) is not None:  # it was killed, or somebody looks in
                subprocess.run(["umount", "-l", str(self.mountpoint)], check=False)

    def _engine(self, part: str) -> None:
        """Run one engine process and tell what it reports; it has ended when this returns."""
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": str(THREADS),
            "TMPDIR": str(self.mountpoint.parent),  # torch leaves a directory there
        }
        command = [sys.executable, "-m", "twfs_tools.demo_agent", part, self.plan.dump()]
        with (
            tempfile.TemporaryFile("w+") as errors,
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
            ) as engine,
        ):
            try:
                assert engine.stdout is not None
                for line in engine.stdout:
                    event = json.loads(line)
                    self._tell(event.pop("event"), event)
                code = engine.wait()
            except BaseException:
                engine.kill()
                raise
            if code:
                errors.seek(0)
                raise _error_of(code, errors.read())

    def _tell(self, event: str, figures: dict[str, Any]) -> None:
        """Keep what an engine reported, and say it in a line."""
        if event in {"turn", "timing"}:
            self.figures[f"{event}s"].append(figures)
        else:
            self.figures[event] = figures
        self._say(_LINES[event].format(**figures, **_readable(figures)))

    def _judge(self) -> None:
        """Show what had to be equal; EqualityFailed unless all of it is."""
        verdicts = verdicts_of(self.figures)
        self.figures["verdicts"] = [
            {"claim": claim, "holds": holds} for claim, holds in verdicts.items()
        ]
        for claim, holds in verdicts.items():
            self._say(f"  {'yes' if holds else 'NO '}  {claim}", "green" if holds else "red")
        failed = [claim for claim, holds in verdicts.items() if not holds]
        if failed:
            raise EqualityFailed(
                f"{len(failed)} of {len(verdicts)} comparisons failed, so this KV cannot be "
                f"trusted; not so: {'; '.join(failed)}"
            )

    def _look(self) -> None:
        """Run what an operator would type on the mount."""
        model = self.figures["model"]["name"]
        sessions = [path for path in (self.mountpoint / model).iterdir() if len(path.name) == 32]
        sessions.sort(key=lambda path: len(list(path.iterdir())), reverse=True)
        names = [f"{model}/{path.name}" for path in sessions]
        shared = [f"{name}/00000.kv" for name in names]
        self._say(f"$ cd {self.mountpoint}", "cyan")
        for command in (
            ["ls", "-l", model],
            ["ls", "-l", names[0]],
            *(["du", "-sh", name] for name in (*names, model)),
            ["stat", "-c", "%h links, inode %i, %s bytes, %b blocks of 512: %n", *shared],
            ["getfattr", "-d", shared[0]],
            ["df", "-h", str(self.mountpoint)],
        ):
            done = subprocess.run(
                command, cwd=self.mountpoint, capture_output=True, text=True, check=False
            )
            self._shown(command, done.stdout + done.stderr)

    def _show_timings(self) -> None:
        """Print the table of cold and warm times."""
        table = Table("prompt", "held", "cold", "warm", "of it load", "ratio")
        for each in self.figures["timings"]:
            each["ratio"] = each["cold_s"] / each["warm_s"]
            table.add_row(
                f"{each['prompt_tokens']:,}", f"{each['held_tokens']:,}",
                f"{each['cold_s']:.3f} s", f"{each['warm_s']:.3f} s",
                f"{each['load_s']:.3f} s", f"{each['ratio']:.1f} x",
            )  # fmt: skip
        self.console.print(table)
        self._say(
            "Cold computes the whole prompt; warm matches, reads (O_DIRECT, so never from the page "
            f"cache) and computes {COMPUTED} tokens. float32, {THREADS} threads, medians."
        )


_LINES: Final = {
    "model": "model {name}: {parameters:,} parameters, {token_bytes_text} of KV per token, "
    "blocks of {block_bytes_text}; ready after {seconds:.1f} s",
    "turn": "session {session}: {tokens:>5} tokens, {loaded} loaded, {computed} computed in "
    "{compute_s:.2f} s; saved in {save_s:.3f} s: {stored_blocks} new blocks "
    "({stored_bytes_text}), {present_blocks} there before",
    "reference": "KV, logits and answer to the next prompt of {prompt_tokens} tokens are kept in "
    "a file outside twfs; SHA-256 of the KV {sha256}",
    "answer": "prompt of {prompt_tokens} tokens: {held_tokens} loaded in {load_s:.3f} s, first "
    "token after {ttft_s:.3f} s; it says {text} (random weights)",
    "equal": "SHA-256 of the loaded KV {sha256}",
    "recompute": "full recompute done: logits differ by at most {logits_difference_max:.1e}",
    "timing": "{prompt_tokens} tokens: cold {cold_s:.3f} s (median of {cold_rounds}), warm "
    "{warm_s:.3f} s (median of {warm_rounds})",
}


def verdicts_of(figures: dict[str, Any]) -> dict[str, bool]:
    """Return what must be so, each as a sentence, and whether the engines' *figures* say so."""
    equal, recompute = figures["equal"], figures["recompute"]
    difference = recompute["logits_difference_max"]
    return {
        f"the prompt's {figures['tokens']} saved tokens were all loaded":
            figures["answer"]["held_tokens"] == figures["tokens"],
        "loaded KV = saved KV, bit by bit (torch.equal and SHA-256)":
            equal["kv"] and equal["sha256"] == figures["reference"]["sha256"],
        f"logits on loaded KV = logits on never-saved KV, bit by bit "
        f"({equal['logits_compared']:,} of them)": equal["logits"],
        f"logits against a full recompute: largest difference {difference:.1e} "
        f"(allowed {DIFFERENCE_MAX:.0e})": difference <= DIFFERENCE_MAX,
        "greedy tokens: the same loaded, never saved, and recomputed":
            equal["answer"] and recompute["answer"],
    }  # fmt: skip


def _readable(figures: dict[str, Any]) -> dict[str, str]:
    """Return every figure in bytes again, as text with its unit."""
    return {f"{name}_text": size(of) for name, of in figures.items() if name.endswith("_bytes")}


def _error_of(code: int, errors: str) -> Exception:
    """Return the error of a process of ours that ended with *code*, from what it wrote."""
    text = errors.strip() or "it wrote nothing"
    for kind in TwfsError.__subclasses__():
        if kind.exit_code == code != TwfsError.exit_code:
            return kind(text.splitlines()[-1].removeprefix("twfs: "))
    return RuntimeError(f"a process of the demo ended with {code}:\n{text}")


def draw(plot: Path, figures: dict[str, Any]) -> None:
    """Write the PNG *plot*: time to first token, cold and warm, by prompt length."""
    import matplotlib as mpl  # noqa: PLC0415 - seconds, at the end only

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415 - after the backend was chosen

    timings = figures["timings"]
    lengths = [each["prompt_tokens"] for each in timings]
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for name, label, colour in (
        ("cold_s", "cold: the whole prompt is computed", "tab:red"),
        ("warm_s", f"warm: KV loaded from twfs, {COMPUTED} tokens computed", "tab:blue"),
    ):
        times = [each[name] for each in timings]
        axes.plot(lengths, times, "o-", label=label, color=colour)
        for at, value in zip(lengths, times, strict=True):
            axes.annotate(
                f"{value:.2g} s",
                (at, value),
                textcoords="offset points",
                xytext=(0, 8),
                ha="center",
            )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.minorticks_off()
    axes.margins(y=0.15)
    axes.set_xlabel("prompt length (tokens)")
    axes.set_ylabel("time to first token (s)")
    parameters = figures["model"]["parameters"] / 1e6
    axes.set_title(
        f"Time to first token, {parameters:.3g} M parameters, float32, {THREADS} CPU threads"
    )
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    with suppress(FileExistsError):
        plot.parent.mkdir(parents=True)
    figure.savefig(plot, dpi=150)
    plt.close(figure)
