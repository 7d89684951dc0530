"""`mount.twfs`, which mount(8) and fstab call: `mount -t twfs DIRECTORY MOUNTPOINT -o options`.

Starts the daemon in the background and ends once it is mounted, with the exit codes of mount(8).
"""

import getopt
import sys
from pathlib import Path
from typing import Final, NamedTuple

from twfs.errors import InvalidInput, TwfsError
from twfs_tools.process import daemon_command, start_daemon

USAGE: Final = "usage: mount.twfs DIRECTORY MOUNTPOINT [-sfnv] [-o options]"
EXIT_USAGE: Final = 1
EXIT_SYSTEM: Final = 2
EXIT_INTERRUPTED: Final = 8
EXIT_REFUSED: Final = 32

OURS: Final = frozenset({"ro", "allow_other"})
OURS_WITH_VALUE: Final = frozenset({"socket", "group", "uid", "gid", "file_mode", "dir_mode"})
# What fstab may say to mount(8), systemd and nobody else; nosuid, nodev, noexec hold in any case.
GENERIC: Final = frozenset({
    "defaults", "rw", "auto", "noauto", "user", "nouser", "users", "owner", "group", "nofail",
    "_netdev", "async", "sync", "atime", "noatime", "relatime", "norelatime", "strictatime",
    "diratime", "nodiratime", "dev", "nodev", "suid", "nosuid", "exec", "noexec", "silent", "loud",
    "nomand",
})  # fmt: skip
GENERIC_PREFIXES: Final = ("x-", "X-", "comment=")


class Request(NamedTuple):
    """What one call of mount.twfs asks for."""

    source: Path
    target: Path
    options: str
    fake: bool
    verbose: bool


def daemon_options(text: str, *, sloppy: bool = False) -> str:
    """Return those of the comma-separated mount options *text* that the daemon takes.

    InvalidInput on one that nobody knows, unless *sloppy*.
    """
    kept = []
    for option in filter(None, text.split(",")):
        name, equals, value = option.partition("=")
        if option in OURS or (name in OURS_WITH_VALUE and equals and value):
            kept.append(option)
        elif option not in GENERIC and not option.startswith(GENERIC_PREFIXES) and not sloppy:
            known = ", ".join([*sorted(OURS), *(f"{each}=" for each in sorted(OURS_WITH_VALUE))])
            raise InvalidInput(f"mount option {option!r} is not known; known are {known}")
    return ",".join(kept)


def parse(arguments: list[str]) -> Request:
    """Return what *arguments* (without the program's name) ask for; InvalidInput."""
    try:
        flags, names = getopt.gnu_getopt(arguments, "sfnvN:o:t:")
    except getopt.GetoptError as error:
        raise InvalidInput(f"{error}; {USAGE}") from error
    if len(names) != 2:
        raise InvalidInput(USAGE)
    given = {flag for flag, _ in flags}
    if "-N" in given:
        raise InvalidInput("mount namespaces (-N) are not supported: use nsenter")
    text = ",".join(value for flag, value in flags if flag == "-o")
    if "remount" in text.split(","):
        raise InvalidInput("remount is not supported: unmount and mount again")
    options = daemon_options(text, sloppy="-s" in given)
    source, target = (Path(name).absolute() for name in names)
    return Request(source, target, options, "-f" in given, "-v" in given)


def main(arguments: list[str] | None = None) -> int:
    """Mount as mount(8) wants it and return its exit code; one sentence on stderr if it fails."""
    try:
        request = parse(sys.argv[1:] if arguments is None else arguments)
    except InvalidInput as error:
        print(f"mount.twfs: {error}", file=sys.stderr)
        return EXIT_USAGE
    command = daemon_command(request.source, request.target, options=request.options)
    if request.verbose:
        print(f"mount.twfs: {' '.join(command)}", file=sys.stderr)
    if request.fake:
        return 0
    try:
        daemon = start_daemon(command, request.source / "daemon.log")
    except TwfsError as error:
        print(f"mount.twfs: {error}", file=sys.stderr)
        return EXIT_REFUSED
    except OSError as error:
        print(f"mount.twfs: {request.source}: {error.strerror}", file=sys.stderr)
        return EXIT_SYSTEM
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    if request.verbose:
        print(f"mount.twfs: {request.target} is mounted by daemon {daemon.pid}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
