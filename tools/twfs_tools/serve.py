"""`twfs serve`, `twfs mount` and `twfs unmount`: the daemon's life, from a person's side.

The daemon itself is twfs_mount's; here it is only started, waited for and ended.
"""

import os
from pathlib import Path
from typing import Annotated

import typer

from twfs.errors import MountRefused, NoDaemon
from twfs.store import Durability
from twfs_tools.output import JsonFlag, parse_size, print_json, say, working
from twfs_tools.process import await_end, daemon_command, start_daemon
from twfs_tools.process import unmount as unmount_now
from twfs_tools.target import daemon_pid, find_mount

DirectoryArgument = Annotated[Path, typer.Argument(help="The warehouse's directory.")]
SocketAt = Annotated[
    Path | None, typer.Option("--socket", help="Where to listen; default DIRECTORY/socket.")
]
ArenaOption = Annotated[
    str | None, typer.Option("--arena-bytes", help="Memory for the uploads of all clients.")
]
DurabilityOption = Annotated[
    Durability,
    typer.Option("--durability", help="relaxed: twice the commits, a power cut may undo the last."),
]
DegradedFlag = Annotated[
    bool,
    typer.Option(
        "--degraded/--no-degraded",
        help="Start without devices that are missing or damaged: their blocks are misses.",
    ),
]
GroupOption = Annotated[
    str | None,
    typer.Option("--group", help="Whose members use it; default: as `twfs create --group` said."),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", help="Settings, TOML; default DIRECTORY/twfs.toml if it is there."),
]
MountOptions = Annotated[
    str, typer.Option("-o", help="ro, allow_other, uid=, gid=, group=, file_mode=, dir_mode=.")
]


def serve(
    directory: DirectoryArgument,
    mountpoint: Annotated[
        Path | None, typer.Argument(help="Mount here too; needs no --no-mount.")
    ] = None,
    socket: SocketAt = None,
    arena: ArenaOption = None,
    options: MountOptions = "",
    *,
    durability: DurabilityOption = Durability.STRICT,
    group: GroupOption = None,
    no_mount: Annotated[bool, typer.Option("--no-mount", help="Serve the socket alone.")] = False,
    degraded: DegradedFlag = True,
    config: ConfigOption = None,
) -> None:
    """Run the daemon in the foreground; SIGTERM or Ctrl-C ends it."""
    if no_mount and mountpoint is not None:
        raise MountRefused(f"--no-mount contradicts the mount point {mountpoint}: give one of them")
    _become(
        daemon_command(
            directory, mountpoint, options=options, socket=socket, group=group,
            arena_bytes=parse_size(arena) if arena is not None else None, durability=durability,
            degraded=degraded, config=config,
        )
    )  # fmt: skip


def _become(command: list[str]) -> None:
    """Replace this process, so that signals and the exit code are the daemon's own."""
    os.execv(command[0], command)


def mount(
    directory: DirectoryArgument,
    mountpoint: Annotated[Path, typer.Argument(help="An empty directory.")],
    options: MountOptions = "",
    socket: SocketAt = None,
    arena: ArenaOption = None,
    *,
    durability: DurabilityOption = Durability.STRICT,
    group: GroupOption = None,
    foreground: Annotated[
        bool,
        typer.Option("--foreground/--background", help="Stay, or come back once it is mounted."),
    ] = False,
    degraded: DegradedFlag = True,
    config: ConfigOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Start the daemon with a mount; its log is DIRECTORY/daemon.log when in the background."""
    command = daemon_command(
        directory, mountpoint, options=options, socket=socket, group=group,
        arena_bytes=parse_size(arena) if arena is not None else None, durability=durability,
        degraded=degraded, config=config,
    )  # fmt: skip
    if foreground:
        _become(command)
    log = directory / "daemon.log"
    with working(f"mounting {mountpoint}"):
        daemon = start_daemon(command, log)
    if as_json:
        print_json({"pid": daemon.pid, "mountpoint": mountpoint, "log": log})
    else:
        say(f"{mountpoint} is mounted; daemon {daemon.pid}, log {log}")


def unmount(
    mountpoint: Annotated[Path, typer.Argument(help="Where the warehouse is mounted.")],
    *,
    lazy: Annotated[
        bool, typer.Option("--lazy", help="Take it away now; open files end it later.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Unmount and wait until the daemon behind the mount has ended."""
    mounted = find_mount(mountpoint.absolute())
    if mounted is None:
        raise MountRefused(f"no warehouse is mounted on {mountpoint}: see `findmnt -t fuse.twfs`")
    pid = daemon_of(Path(mounted.source))
    unmount_now(mounted.mountpoint, lazy=lazy)
    if pid is not None and not lazy:
        with working(f"waiting for daemon {pid}"):
            ended = await_end(pid)
        if not ended:
            raise NoDaemon(
                f"{mountpoint} is unmounted, but daemon {pid} still runs: it may be serving its "
                f"socket alone; end it with kill {pid}"
            )
    if as_json:
        print_json({"mountpoint": mountpoint, "pid": pid, "lazy": lazy})
    else:
        say(f"{mountpoint} is unmounted" + ("" if pid is None or lazy else f"; daemon {pid} ended"))


def daemon_of(directory: Path) -> int | None:
    """Return the process of the daemon of the warehouse in *directory*, if it answers."""
    return daemon_pid(directory / "socket") if directory.is_absolute() else None
