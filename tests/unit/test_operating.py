"""An operator's verbs: arguments are checked where they come in, and only operators get through."""

import os
from pathlib import Path

import msgspec
import pytest

from support.daemon import running_daemon
from support.warehouses import make_warehouse
from twfs.client import connect
from twfs.core.operating import ARGUMENTS_BYTES_MAX, NoArguments, Verb, operate
from twfs.errors import InvalidInput, NotAllowed
from twfs.units import ByteCount


class Sum(msgspec.Struct, forbid_unknown_fields=True):
    """What "sum" takes."""

    numbers: list[int]


VERBS = {"sum": Verb(Sum, lambda given: sum(given.numbers)), "nothing": Verb(NoArguments, str)}


def test_a_verb_gets_its_arguments_and_returns_its_result() -> None:
    assert operate(VERBS, "sum", b'{"numbers": [1, 2]}') == b"3"


@pytest.mark.parametrize(
    ("verb", "arguments", "why"),
    [
        ("product", b"{}", "no operation 'product': this daemon knows nothing, sum"),
        ("sum", b'{"numbers": ["a"]}', "arguments of 'sum'"),
        ("sum", b'{"numbers": [1], "more": 1}', "arguments of 'sum'"),
        ("sum", b"\xff", "arguments of 'sum'"),
        ("nothing", b'{"a": 1}', "arguments of 'nothing'"),
        ("nothing", b"[" * 60_000, "arguments of 'nothing'"),
        ("nothing", bytes(ARGUMENTS_BYTES_MAX + 1), "at most"),
    ],
)
def test_what_is_no_verb_or_not_its_arguments_is_refused(
    verb: str, arguments: bytes, why: str
) -> None:
    with pytest.raises(InvalidInput, match=why):
        operate(VERBS, verb, arguments)


@pytest.mark.root
def test_only_root_and_the_daemons_user_operate(scratch: Path) -> None:
    make_warehouse(scratch)
    with running_daemon(scratch) as daemon:
        scratch.chmod(0o711)
        daemon.socket.chmod(0o666)
        with connect(daemon.socket) as own:
            with pytest.raises(InvalidInput, match="no operation"):
                own.operate("nonsense")
            os.seteuid(65534)
            try:
                other = connect(daemon.socket)
            finally:
                os.seteuid(0)
            with other:
                assert other.models() == []  # it is served
                for forbidden in (
                    lambda: other.operate("nonsense"), other.check,
                    lambda: other.evict(ByteCount(1)),
                ):  # fmt: skip
                    with pytest.raises(NotAllowed, match="uid 65534"):
                        forbidden()
            assert own.check().findings == ()
