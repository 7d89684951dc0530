"""What the daemon hands to a client: the table of devices, descriptors of them, and an arena.

At the welcome, and again whenever a client asks because it has met a device that it does not know.
Requests are connection.py's business.
"""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import trio

from twfs.daemon.shared import Shared
from twfs.devices.arena import Arena
from twfs.errors import ProtocolError, TooLarge, TwfsError
from twfs.protocol.messages import AnyRequest, Hello
from twfs.protocol.wire import PROTOCOL_VERSION, WireDevice
from twfs.units import align_up

if TYPE_CHECKING:
    from twfs.warehouse import Warehouse

DESCRIPTORS_MAX: Final = 253  # the kernel's SCM_MAX_FD


@dataclass(slots=True)
class Handed:
    """The table of devices, and a fresh descriptor of each that is there, to be passed on."""

    rows: tuple[WireDevice, ...]
    descriptors: list[int]

    def close(self) -> None:
        """Close the descriptors, passed or not."""
        while self.descriptors:
            os.close(self.descriptors.pop())


def hand_out(warehouse: "Warehouse") -> Handed:
    """Open all devices for one client; blocks. TooLarge if a message cannot pass so many."""
    members = warehouse.table()
    if len(members) >= DESCRIPTORS_MAX:
        raise TooLarge(f"{len(members)} devices: a client can be handed {DESCRIPTORS_MAX - 1}")
    handed = Handed((), [])
    rows = []
    try:
        for record, path, device in members:
            passed = False
            if device is not None:
                try:
                    handed.descriptors.append(device.open_for_reader())
                    passed = True
                except TooLarge:  # it would see nothing but misses for as long as it is connected
                    raise
                except TwfsError:  # a device that is gone makes misses, not a dead client
                    passed = False
            rows.append(
                WireDevice(record.index, record.uuid.bytes, str(path), record.size_bytes, passed)
            )
    except BaseException:
        handed.close()
        raise
    handed.rows = tuple(rows)
    return handed


def hello_of(request: AnyRequest) -> Hello:
    """Return the first message of a client; ProtocolError if it is none of ours."""
    if not isinstance(request, Hello):
        raise ProtocolError(f"the first message is a {type(request).__name__}, not a Hello")
    if request.version != PROTOCOL_VERSION:
        raise ProtocolError(
            f"the client speaks version {request.version} of the protocol and the daemon "
            f"{PROTOCOL_VERSION}: install the same twfs on both sides"
        )
    return request


async def make_arena(shared: Shared, hello: Hello, uid: int) -> Arena | None:
    """Make the arena that *hello* asks for, within what *uid* and all clients together may have.

    It is counted by `shared.add_arena`, for its byte_count; who closes it takes that back.
    """
    if not hello.arena_bytes:
        return None
    byte_count = align_up(hello.arena_bytes)
    shared.check_arena(uid, byte_count)
    shared.add_arena(uid, byte_count)
    hugetlb = hello.hugetlb and uid in {0, os.geteuid()}
    make = lambda: Arena.shared(byte_count, hugetlb=hugetlb)  # noqa: E731
    try:
        arena = await trio.to_thread.run_sync(make, limiter=shared.account(uid).commits)
    except BaseException:
        shared.add_arena(uid, -byte_count)
        raise
    shared.add_arena(uid, arena.byte_count - byte_count)  # huge pages round up
    shared.arenas[arena.pages] += 1
    return arena
