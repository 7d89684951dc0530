"""A hint is checked where it is made and again where it comes in: what is malformed ends there."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twfs import Group, Hint, Layout, Model, Retention, Stop
from twfs.errors import InvalidInput, ProtocolError
from twfs.hints import NO_HINT, RETURN_MS_MAX, SESSION_BYTES_MAX, check_session
from twfs.protocol.codec import decode_request, encode, hint_of, hint_to_wire, names_to_wire
from twfs.protocol.messages import ForgetSession, TouchNames
from twfs.protocol.wire import LENGTH_BYTES, WireHint
from twfs.units import ModelId

MODEL = Model(ModelId(1), "m", 0, Layout("m", (Group(2, 2, 8),), 16))
NAMES = names_to_wire(MODEL.chain().extend(list(range(32))).names())


@pytest.mark.parametrize(
    "fields",
    [
        {"session": "x" * (SESSION_BYTES_MAX + 1)},
        {"session": "é" * (SESSION_BYTES_MAX // 2 + 1)},
        {"session": "a\0b"},
        {"session": "a\nb"},
        {"session": "\ud800"},
        {"session": 7},
        {"retention": "pinned!"},
        {"stop": 1},
        {"return_ms": -1},
        {"return_ms": RETURN_MS_MAX + 1},
        {"return_ms": True},
        {"return_ms": 0.5},
    ],
    ids=str,
)
def test_a_malformed_hint_is_the_callers_mistake(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput):
        Hint(**fields)


def test_an_id_is_wanted_where_a_session_is_named() -> None:
    with pytest.raises(InvalidInput, match="empty"):
        check_session("")
    assert check_session("a/b c") == "a/b c"


@given(
    session=st.text(st.characters(categories=("L", "N", "P")), max_size=30),
    retention=st.none() | st.sampled_from(Retention),
    stop=st.none() | st.sampled_from(Stop),
    return_ms=st.none() | st.integers(0, RETURN_MS_MAX),
)
def test_a_hint_comes_over_the_wire_as_it_was(
    session: str, retention: Retention | None, stop: Stop | None, return_ms: int | None
) -> None:
    hint = Hint(session, retention, stop, return_ms)
    wire = hint_to_wire(hint)
    assert (wire is None) == (hint == NO_HINT)
    request = TouchNames(0, 1, NAMES, 0, wire)
    arrived = decode_request(bytes(encode(request)[LENGTH_BYTES:]))
    assert isinstance(arrived, TouchNames)
    assert hint_of(arrived.hint) == hint


@pytest.mark.parametrize(
    "hint",
    [
        ["x" * (SESSION_BYTES_MAX + 1)],
        ["a\0b"],
        ["", "forever"],
        ["", None, "stopped"],
        ["", None, None, -1],
        ["", None, None, RETURN_MS_MAX + 1],
        [7],
    ],
    ids=str,
)
def test_the_daemon_takes_no_malformed_hint(hint: list[Any]) -> None:
    names = msgspec.to_builtins(NAMES, builtin_types=(bytes,))
    body = msgspec.msgpack.encode(
        {"t": "touchnames", "id": 0, "model": 1, "names": names, "hint": hint}
    )
    with pytest.raises(ProtocolError):
        decode_request(body)


@pytest.mark.parametrize("session", ["", "x" * (SESSION_BYTES_MAX + 1)], ids=["empty", "long"])
def test_the_daemon_forgets_no_session_without_a_sound_id(session: str) -> None:
    with pytest.raises(ProtocolError):
        decode_request(bytes(encode(ForgetSession(1, 1, session))[LENGTH_BYTES:]))


def test_stops_have_codes_from_one_on() -> None:
    assert [stop.code for stop in Stop] == [1, 2, 3]
    assert WireHint() == WireHint("", None, None, None)
