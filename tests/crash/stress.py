"""Many engines on one small warehouse for as long as told, while clients and the daemon are killed.

    python tests/crash/stress.py --seconds 60 --clients 8 --seed 1

Two images of 128 MiB, so that eviction never stops; a real `twfsd --no-mount`; client processes
that put sessions with common prefixes, match, read (aligned or not, in pieces, by layers), join
each other's leases, look up, touch, evict, remove, list, check, and open new epochs. Payloads are a
pure function of their names, and every HIT is compared byte for byte. Each second one client is
killed (`--kill-client-every`), every ten seconds the daemon (`--kill-daemon-every`); 0 kills none.
Clients are also stopped for longer than a lease lasts, the daemon for longer than a match waits.

Prints one JSON document: what was done, and `problems`, which are: a wrong byte, bytes beside a
destination, an exception that an engine does not expect, a bad checksum under a lease, a call of an
engine's loop that hung, a process that had to be ended by force, an error in the daemon's log or
figures, a lease, arena or reservation left behind, a finding of the checker, a listing that changes
with a restart. The exit code is 0 if there are none; otherwise the directory stays. The long run,
before a release:

    python tests/crash/stress.py --seconds 3600 --clients 16 --seed $RANDOM --directory /work/tmp/s
    python tests/crash/stress.py --seconds 600 --clients 8 --seed $RANDOM --device-mib 20

The operations follow from the seed; how they interleave does not.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from twfs.client import Client, connect
from twfs.devices.formatting import DeviceSpec
from twfs.errors import TwfsError
from twfs.store import Namespace, iterate_sessions
from twfs.units import ByteCount
from twfs.warehouse import Warehouse
from twfs_tools.process import daemon_command, start_daemon

REPOSITORY: Final = Path(__file__).parents[2]
SOURCES: Final = ("", "tests", "mount", "tools")  # for the processes started here
DEVICE_MIB: Final = 128  # of each of two images; what is put is several times as much
LEASE_MS: Final = 4000  # short, so that leases end while they are held
START_SECONDS: Final = 60.0  # for every client to begin: a busy machine imports slowly
END_SECONDS: Final = 10.0  # for every process to end once it is told to
SETTLE_SECONDS: Final = 10.0  # for the daemon to let go of what dead clients had
TICK_SECONDS: Final = 0.05
PAUSE_CLIENT_EVERY: Final = 3.0  # seconds between the stops of a client
PAUSE_CLIENT_SECONDS: Final = 5.0  # longer than LEASE_MS, shorter than the daemon's patience
PAUSE_DAEMON_EVERY: Final = 1.7
PAUSE_DAEMON_SECONDS: Final = 0.2  # longer than a client waits for a match
LOOP_CALLS: Final = (
    "match", "lookup", "touch", "release", "renew", "join", "read_into", "read_async", "result",
)  # fmt: skip
LOOP_SECONDS_MAX: Final = 10.0  # one of these took longer: it hung, and not for want of a CPU
PROBLEMS_MAX: Final = 50  # in the report
SUSPECT: Final = re.compile(
    r"twfsd: (ERROR|CRITICAL)|Traceback|Error:|exception|Fatal", re.IGNORECASE
)
# Figures of the daemon that are 0 unless something went wrong.
ZERO_COUNTERS: Final = ("digest_mismatches", "collisions", "failed_blocks", "holes", "reports")
ZERO_ERRORS: Final = ("unexpected", "ProtocolError", "InvalidInput", "BadPayload", "DeviceError")


@dataclass(frozen=True, slots=True)
class Options:
    """The command line."""

    seconds: float
    clients: int
    seed: int
    kill_client_every: float
    kill_daemon_every: float
    directory: Path | None
    wrong_every: int
    device_mib: int


class Stress:
    """One run; used once."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.rng = random.Random(options.seed)
        made = options.directory or Path(tempfile.mkdtemp(prefix="twfs-stress-"))
        self.base = made.absolute()
        self.directory = self.base / "warehouse"
        self.records = self.base / "records"
        self.log = self.base / "twfsd.log"
        self.problems: list[Any] = []
        self.clients: list[subprocess.Popen[bytes]] = []
        self.lives = 0
        self.client_kills = 0
        self.daemon_kills = 0
        self.longest_start_s = 0.0
        self.checked: dict[str, int] = {}
        self.listed: list[str] = []  # what the last daemon said that there is
        self.paused: dict[int, float] = {}  # client's number: until when
        self.totals: Counter[str] = Counter()  # of the daemon's counters, over its lives
        self.daemon: subprocess.Popen[bytes] | None = None

    def problem(self, kind: str, **details: Any) -> None:
        """Note what must not be."""
        self.problems.append({"kind": kind, **details})

    # Processes

    def start_daemon(self) -> None:
        """Start the daemon, and wait until it listens."""
        began = time.monotonic()
        command = [*daemon_command(self.directory), "--lease-ms", str(LEASE_MS)]
        self.daemon = start_daemon(command, self.log)
        self.longest_start_s = max(self.longest_start_s, time.monotonic() - began)

    def start_client(self, number: int) -> subprocess.Popen[bytes]:
        """Start the process that is client *number* from now on."""
        self.lives += 1
        task = {
            "directory": str(self.directory), "records": str(self.records),
            "seed": self.options.seed, "number": number, "life": self.lives,
            "clients": self.options.clients, "wrong_every": self.options.wrong_every,
        }  # fmt: skip
        with (self.records / f"{self.lives}.log").open("wb") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "support.stressclient", json.dumps(task)],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            )  # fmt: skip

    def kill_client(self) -> None:
        """Kill one client, and start another in its place."""
        number = self.rng.randrange(len(self.clients))
        self.clients[number].kill()
        self.clients[number].wait()
        self.client_kills += 1
        self.paused.pop(number, None)
        self.clients[number] = self.start_client(number)

    def kill_daemon(self) -> None:
        """Look at the daemon's figures, kill it under all clients, and start it again."""
        assert self.daemon is not None
        self.look()
        self.daemon.kill()
        self.daemon.wait()
        self.daemon_kills += 1
        self.start_daemon()

    def pause_client(self) -> None:
        """Stop a client for so long that its leases end."""
        number = self.rng.randrange(len(self.clients))
        if number not in self.paused:
            self.clients[number].send_signal(signal.SIGSTOP)
            self.paused[number] = time.monotonic() + PAUSE_CLIENT_SECONDS
            self.totals["client pauses"] += 1

    def resume_clients(self, now: float) -> None:
        """Let clients go on whose pause is over at *now*."""
        for number in [number for number, until in self.paused.items() if until <= now]:
            del self.paused[number]
            self.clients[number].send_signal(signal.SIGCONT)

    def pause_daemon(self) -> None:
        """Stop the daemon for so long that matches time out, and their leases come late."""
        assert self.daemon is not None
        self.daemon.send_signal(signal.SIGSTOP)
        time.sleep(PAUSE_DAEMON_SECONDS)
        self.daemon.send_signal(signal.SIGCONT)
        self.totals["daemon pauses"] += 1

    def watch(self) -> None:
        """Note and replace whatever has ended by itself."""
        for number, client in enumerate(self.clients):
            if client.poll() is not None:
                self.problem("a client ended by itself", number=number, code=client.returncode)
                self.clients[number] = self.start_client(number)
        if self.daemon is not None and self.daemon.poll() is not None:
            self.problem("the daemon ended by itself", code=self.daemon.returncode)
            self.start_daemon()

    # The run

    def run(self) -> None:
        """Do it all; problems are noted, not raised."""
        options = self.options
        self.records.mkdir(parents=True, exist_ok=True)
        (self.base / "tokens").mkdir(exist_ok=True)
        Warehouse.create(
            self.directory,
            [
                DeviceSpec(self.directory / f"device{n}.img", ByteCount(options.device_mib << 20))
                for n in range(2)
            ],
        )
        self.start_daemon()
        try:
            self.clients = [self.start_client(number) for number in range(options.clients)]
            self.await_clients()
            self.disturb(time.monotonic() + options.seconds)
        finally:
            self.stop_clients()
            self.settle()
            self.stop_daemon()
        self.check()
        self.read_log()

    def await_clients(self) -> None:
        """Wait until every client works, or has ended: the time of the run counts from then."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and not all(
            (self.records / f"{life}.json").exists() or client.poll() is not None
            for life, client in enumerate(self.clients, 1)
        ):
            time.sleep(TICK_SECONDS)

    def disturb(self, end_s: float) -> None:
        """Kill and stop processes until *end_s*, each kind in its own rhythm."""
        kinds: list[tuple[float, Callable[[], None]]] = [
            (self.options.kill_daemon_every, self.kill_daemon),
            (self.options.kill_client_every, self.kill_client),
            (PAUSE_CLIENT_EVERY, self.pause_client),
            (PAUSE_DAEMON_EVERY, self.pause_daemon),
        ]
        began = time.monotonic()
        due = [began + every for every, _ in kinds]
        while (now := time.monotonic()) < end_s:
            for number, (every, act) in enumerate(kinds):
                if every and due[number] <= now:
                    due[number] += every
                    act()
            self.resume_clients(now)
            self.watch()
            time.sleep(TICK_SECONDS)

    def stop_clients(self) -> None:
        """Tell all clients to end; those that do not are stuck, and say where."""
        self.resume_clients(float("inf"))
        for client in self.clients:
            client.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + END_SECONDS
        for number, client in enumerate(self.clients):
            try:
                code = client.wait(max(0.0, deadline - time.monotonic()))
                if code not in (0, -signal.SIGTERM):  # that one had not even begun
                    self.problem("a client ended with an error", number=number, code=code)
            except subprocess.TimeoutExpired:
                client.send_signal(signal.SIGUSR1)  # faulthandler writes where it is
                with suppress(subprocess.TimeoutExpired):
                    client.wait(1)
                client.kill()
                client.wait()
                self.problem("a client is stuck", number=number)

    def figures(self, client: Client) -> dict[str, Any]:
        """The daemon's statistics."""
        return client._daemon_statistics()

    def look(self) -> None:
        """Note what the daemon's counters say has gone wrong."""
        try:
            with connect(self.directory / "socket", arena_bytes=0) as client:
                figures = self.figures(client)
        except TwfsError as error:
            self.problem("the daemon does not say how it is", error=repr(error))
            return
        counters, errors = figures["counters"], figures["server"]["errors"]
        self.totals.update({name: count for name, count in counters.items() if count})
        self.totals["leases_expired"] += figures["leases"]["leases_expired"]
        wrong = {name: counters[name] for name in ZERO_COUNTERS if counters[name]}
        wrong |= {name: errors[name] for name in ZERO_ERRORS if errors.get(name)}
        if figures["server"]["clients_dropped"]:
            wrong["clients_dropped"] = figures["server"]["clients_dropped"]
        if wrong:
            self.problem("the daemon counted errors", **wrong)

    def left_behind(self, client: Client) -> dict[str, Any]:
        """What the daemon still holds of clients that are gone."""
        figures = self.figures(client)
        server, space = figures["server"], figures["space"]
        found = {
            "clients": server["clients"] - 1,
            "arena_bytes": server["arena_bytes"],
            "leases": figures["leases"]["leases"],
            "lease_owners": figures["leases"]["lease_owners"] - 2,  # the daemon's and ours
            "reserved_bytes": space["reserved_bytes"],
            "limbo_bytes": space["limbo_bytes"],
            "models of old epochs": figures["records"]["models"] - len(client.models()),
            "slots_pending": figures["slots"]["slots_pending"],
            "slots_condemned": figures["slots"]["slots_condemned"],
            "slots_limbo": figures["slots"]["slots_limbo"],
        }
        assert self.daemon is not None
        descriptors = Path(f"/proc/{self.daemon.pid}/fd").iterdir()
        found["arenas"] = sum("memfd:" in os.readlink(each) for each in descriptors)  # noqa: PTH115
        return {name: count for name, count in found.items() if count}

    def settle(self) -> None:
        """Wait until the daemon has let go of everything; note what it keeps."""
        self.look()
        deadline = time.monotonic() + SETTLE_SECONDS
        try:
            with connect(self.directory / "socket", arena_bytes=0) as client:
                while (left := self.left_behind(client)) and time.monotonic() < deadline:
                    time.sleep(TICK_SECONDS)
                self.listed = listing(client)
        except (TwfsError, OSError) as error:
            left = {"error": repr(error)}
        if left:
            self.problem("the daemon keeps what dead clients had", **left)

    def stop_daemon(self) -> None:
        """Tell the daemon to end."""
        assert self.daemon is not None
        self.daemon.terminate()
        try:
            code = self.daemon.wait(END_SECONDS)
            if code:
                self.problem("the daemon ended with an error", code=code)
        except subprocess.TimeoutExpired:
            self.daemon.kill()
            self.daemon.wait()
            self.problem("the daemon is stuck")

    def check(self) -> None:
        """Run the checker over everything, payloads too."""
        try:
            with Warehouse.open(self.directory) as warehouse:
                report = warehouse.check(data=True)
                listed = listing(warehouse)
        except TwfsError as error:
            self.problem("the warehouse cannot be opened", error=repr(error))
            return
        self.checked = {"blocks": report.blocks, "payloads": report.payloads}
        if listed != self.listed:  # memory had drifted away from the tables
            differing = sorted(set(listed) ^ set(self.listed))
            self.problem("a restart changes the listing", lines=differing[:20])
        for finding in report.findings:
            self.problem("finding", invariant=finding.invariant, text=finding.text)

    def read_log(self) -> None:
        """Note errors in the daemon's log, and what clients wrote that nobody asked for."""
        for path in (self.log, *self.records.glob("*.log")):
            lines = path.read_text(errors="replace").splitlines()
            is_daemon = path == self.log
            bad = [line for line in lines if not is_daemon or SUSPECT.search(line)]
            if bad:
                at = lines.index(bad[0])
                self.problem("log", file=path.name, lines=lines[at : at + 30])

    def warnings(self) -> dict[str, int]:
        """The daemon's warnings by text, numbers left out."""
        found = re.findall(r"twfsd: WARNING (.*)", self.log.read_text(errors="replace"))
        return dict(Counter(re.sub(r"\d+", "N", text) for text in found))

    def report(self) -> dict[str, Any]:
        """Everything, from the records of all clients there were."""
        totals: dict[str, Counter[str]] = {
            name: Counter() for name in ("counts", "refusals", "misses")
        }
        longest: dict[str, float] = {}
        for path in self.records.glob("*.json"):
            found = json.loads(path.read_text())
            for name, total in totals.items():
                total.update(found[name])
            for name, seconds in found["longest"].items():
                longest[name] = max(longest.get(name, 0.0), seconds)
        for path in sorted(self.records.glob("*.jsonl")):
            self.problems += map(json.loads, path.read_text().splitlines())
        for name in LOOP_CALLS:
            if longest.get(name, 0.0) > LOOP_SECONDS_MAX:
                self.problem("a call hung", call=name, seconds=longest[name])
        counts = totals["counts"]
        calls = {k.removeprefix("calls."): counts.pop(k) for k in list(counts) if "calls." in k}
        return {
            "ok": not self.problems,
            "options": asdict(self.options),
            "clients": self.lives,
            "client_kills": self.client_kills,
            "daemon_kills": self.daemon_kills,
            "daemon": dict(sorted(self.totals.items())),
            "daemon_start_s_longest": round(self.longest_start_s, 2),
            "counts": dict(sorted(counts.items())),
            "calls": dict(sorted(calls.items())),
            "refusals": dict(sorted(totals["refusals"].items())),
            "misses": dict(sorted(totals["misses"].items())),
            "longest_s": {name: round(longest[name], 3) for name in sorted(longest)},
            "warnings": self.warnings(),
            "checked": self.checked,
            "problem_kinds": dict(Counter(problem["kind"] for problem in self.problems)),
            "problems": self.problems[:PROBLEMS_MAX],
        }


def listing(store: Namespace) -> list[str]:
    """Everything that *store* lists, in its order: models, sessions, blocks, space."""
    lines = [str(replace(store.space(), limbo_bytes=ByteCount(0)))]
    for model in store.models():
        lines.append(str(model))
        lines += sorted(map(str, store.detached(model.id)))
        for session in iterate_sessions(store, model.id):
            lines.append(str(session))
            lines += map(str, store.chain_of(model.id, session.head))
    return lines


def options_of(arguments: list[str] | None) -> Options:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Stress one warehouse with many engines.")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kill-client-every", type=float, default=1, metavar="SECONDS")
    parser.add_argument("--kill-daemon-every", type=float, default=10, metavar="SECONDS")
    parser.add_argument("--directory", type=Path, help="an empty directory; it stays")
    parser.add_argument(
        "--wrong-every", type=int, default=0, metavar="PUTS",
        help="let every so many-th put store a wrong block: the run must fail",
    )  # fmt: skip
    parser.add_argument(
        "--device-mib", type=int, default=DEVICE_MIB,
        help="of each of two images; with 20 everything is under lease now and then",
    )  # fmt: skip
    return Options(**vars(parser.parse_args(arguments)))


def main(arguments: list[str] | None = None) -> int:
    """Run; return 0 if all is well."""
    options = options_of(arguments)
    paths = [str(REPOSITORY / source) for source in SOURCES]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    stress = Stress(options)
    stress.run()
    report = stress.report()
    print(json.dumps(report, indent=1, default=str))  # noqa: T201
    if report["ok"] and options.directory is None:
        shutil.rmtree(stress.base)
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
