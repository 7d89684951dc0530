"""`twfs bench`: twfs beside fio, beside its own mount, and against its own size.

Every comparison runs both sides in turn on the same bytes and gives the ratio of medians. All
scratch is removed and every daemon ended, also after an error.
"""

import typer

from twfs_tools.bench.check import check
from twfs_tools.bench.commit import commit
from twfs_tools.bench.match import match
from twfs_tools.bench.mount import mount
from twfs_tools.bench.read import read
from twfs_tools.bench.scrub import scrub
from twfs_tools.bench.write import write

app = typer.Typer(help="Measure twfs on this machine, beside fio where there is a rival.")
for command in (read, write, commit, match, mount, scrub, check):
    app.command(command.__name__)(command)
