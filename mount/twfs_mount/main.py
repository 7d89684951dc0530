"""`twfsd`: arguments in, a running daemon out; one sentence on stderr and an exit code on failure.

Also takes the form in which mount.fuse3 starts a filesystem: `twfsd SOURCE /dev/fd/N -o options`.
"""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from twfs.core.modes import gid_of
from twfs.errors import InvalidInput, TwfsError
from twfs.store import Durability
from twfs_mount import mountpoint as places

if TYPE_CHECKING:
    from twfs_mount.daemon import DaemonConfig

# What mount(8), fstab and mount.fuse3 may say to us and means nothing to us.
GENERIC: Final = frozenset({
    "rw", "defaults", "auto", "noauto", "user", "nouser", "users", "owner", "group", "nofail",
    "_netdev", "async", "sync", "atime", "noatime", "relatime", "norelatime", "strictatime",
    "diratime", "nodiratime", "dev", "nodev", "suid", "nosuid", "exec", "noexec",
    "default_permissions", "auto_unmount", "drop_privileges", "subtype=twfs",
})  # fmt: skip
GENERIC_PREFIXES: Final = ("x-", "X-", "comment=", "fsname=", "subtype=", "user=", "setuid=")
KNOWN: Final = "ro, allow_other, uid=, gid=, group=, file_mode=, dir_mode=, socket="


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="twfsd", description="Serve a token warehouse on a socket and on a mount point."
    )
    add = made.add_argument
    add("directory", type=Path, help="the warehouse's directory")
    add("mountpoint", nargs="?", help="an empty directory, or /dev/fd/N from mount.fuse3")
    add("-o", dest="options", action="append", default=[], help=f"mount options: {KNOWN}")
    add("--socket", type=Path, help="where to listen; default DIRECTORY/socket")
    add("--group", help="whose members use it beside the owner; default: of `twfs create --group`")
    add("--no-mount", action="store_true", help="serve the socket alone")
    add("--arena-bytes", type=int, help="memory for the uploads of all clients")
    add("--payload-bytes", type=int, help="memory for verified payloads of the mount")
    add("--lease-ms", type=int, help="how long a lease lasts unless renewed")
    add(
        "--durability", choices=[each.value for each in Durability], default=Durability.STRICT,
        help="relaxed commits sooner, and a power cut may undo the last commit; default strict",
    )  # fmt: skip
    add("--config", type=Path, help="settings, TOML; default DIRECTORY/twfs.toml if it is there")
    add("--no-degraded", action="store_true", help="do not start without all devices")
    add("--debug", action="store_true", help="log every refused request")
    where = made.add_mutually_exclusive_group()
    where.add_argument("--foreground", "-f", action="store_true", help="stay; the default")
    where.add_argument("--background", action="store_true", help="end once it is ready")
    return made


def number_of(option: str, value: str, base: int = 10) -> int:
    """Return an option's number; InvalidInput if it is none."""
    try:
        number = int(value, base)
    except ValueError as error:
        raise InvalidInput(f"mount option {option}: {value!r} is not a number") from error
    if not 0 <= number < 1 << 32:
        raise InvalidInput(f"mount option {option}: {value!r} is out of range")
    return number


def mount_options(texts: Sequence[str]) -> dict[str, Any]:
    """Parse `-o` into fields of MountOptions, and socket and group; InvalidInput on others."""
    readers: dict[str, tuple[str, Callable[[str], Any]]] = {
        "uid": ("uid", lambda value: number_of("uid", value)),
        "gid": ("gid", lambda value: number_of("gid", value)),
        "group": ("group", gid_of),
        "file_mode": ("file_mode", lambda value: number_of("file_mode", value, 8) & 0o777),
        "dir_mode": ("directory_mode", lambda value: number_of("dir_mode", value, 8) & 0o777),
        "socket": ("socket", Path),
    }
    found: dict[str, Any] = {}
    for option in filter(None, ",".join(texts).split(",")):
        name, equals, value = option.partition("=")
        if option == "ro":
            found["read_only"] = True
        elif option == "allow_other":
            found["allow_other"] = True
        elif name in readers and equals:
            field, read = readers[name]
            found[field] = read(value)
        elif option not in GENERIC and not option.startswith(GENERIC_PREFIXES):
            raise InvalidInput(f"mount option {option!r} is not known; known are {KNOWN}")
    return found


def config_of(given: argparse.Namespace) -> "DaemonConfig":
    """Make a configuration of parsed arguments; InvalidInput."""
    from twfs_mount.daemon import DaemonConfig, MountOptions  # noqa: PLC0415  (after the fork)

    if given.no_mount and given.mountpoint is not None:
        raise InvalidInput(f"--no-mount contradicts the mount point {given.mountpoint}")
    fields = mount_options(given.options)
    group = gid_of(given.group) if given.group is not None else fields.pop("group", None)
    fields.pop("group", None)
    socket = given.socket or fields.pop("socket", None)
    fields.pop("socket", None)
    sizes = {
        name: getattr(given, name)
        for name in ("arena_bytes", "payload_bytes", "lease_ms")
        if getattr(given, name) is not None
    }
    for name, value in sizes.items():
        if value <= 0:
            raise InvalidInput(f"--{name.replace('_', '-')} is {value}: it must be above 0")
    mountpoint = None if given.mountpoint is None else str(Path(given.mountpoint).absolute())
    return DaemonConfig(
        given.directory.absolute(), mountpoint, socket, group=group,
        options=MountOptions(**fields), durability=Durability(given.durability),
        degraded=not given.no_degraded, config=given.config, **sizes,
    )  # fmt: skip


def run(given: argparse.Namespace, on_ready: Callable[[], None]) -> int:
    """Run the daemon that *given* describes and return its exit code."""
    try:
        from twfs_mount import daemon  # noqa: PLC0415  (after the fork)

        daemon.run(config_of(given), on_ready)
    except TwfsError as error:
        print(f"twfsd: {error}", file=sys.stderr, flush=True)  # noqa: T201
        return error.exit_code
    return 0


def run_in_background(given: argparse.Namespace) -> int:
    """Fork, before anything is opened; return in the parent once the child is ready or has failed.

    The child keeps its exit code for the parent: the pipe brings it.
    """
    read_end, write_end = os.pipe()
    if os.fork():
        os.close(write_end)
        with open(read_end, "rb") as pipe:
            answer = pipe.read(1)
        return answer[0] if answer else 1
    os.close(read_end)
    os.setsid()

    def on_ready() -> None:
        os.write(write_end, b"\0")
        os.close(write_end)
        quiet = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):
            os.dup2(quiet, stream)
        os.close(quiet)

    code = run(given, on_ready)
    if code:
        os.write(write_end, bytes([code]))
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `twfsd` with *arguments* (default: the process's own) and return its exit code."""
    given = parser().parse_args(arguments)
    logging.basicConfig(
        level=logging.DEBUG if given.debug else logging.INFO,
        format="twfsd: %(levelname)s %(message)s",
        stream=sys.stderr,
    )
    by_helper = given.mountpoint is not None and places.is_descriptor(given.mountpoint)
    supervised = "NOTIFY_SOCKET" in os.environ
    if given.background or (by_helper and not given.foreground and not supervised):
        return run_in_background(given)
    return run(given, lambda: None)


if __name__ == "__main__":
    sys.exit(main())
