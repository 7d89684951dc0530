"""Guarantees that an arena never gives one byte to two holders, never grows, and cannot shrink.

Shared ones are seen by another process; the seals keep a peer from cutting the memory off.
"""

import fcntl
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twfs.devices.arena import Arena, Piece
from twfs.errors import InvalidInput, TooLarge


def test_private_memory_is_aligned_to_a_huge_page() -> None:
    arena = Arena.private(3 << 20)
    assert arena.address % (2 << 20) == 0
    assert (arena.byte_count, len(arena.view), arena.fd) == (3 << 20, 3 << 20, None)
    arena.view[-1] = 9
    arena.close()


def test_pieces_begin_at_4_kib_and_have_the_length_asked_for() -> None:
    arena = Arena.private(64 << 10)
    pieces = [arena.take(n) for n in (1, 4096, 4097, 20000)]
    offsets = []
    for piece, byte_count in zip(pieces, (1, 4096, 4097, 20000), strict=True):
        assert piece is not None
        assert (len(piece.view), piece.offset % 4096) == (byte_count, 0)
        offsets.append(piece.offset)
    assert offsets == [0, 4096, 8192, 16384]
    assert arena.statistics()["in_use_bytes"] == 4096 + 4096 + 8192 + 20480


@settings(max_examples=60)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 40_000)), max_size=60))
def test_no_byte_is_in_two_pieces_and_all_come_back(steps: list[tuple[bool, int]]) -> None:
    arena = Arena.private(256 << 10)
    held: list[Piece] = []
    for take, number in steps:
        if take:
            piece = arena.take(number, timeout_s=0)
            if piece is not None:
                end = piece.offset + number
                assert end <= arena.byte_count
                for other in held:
                    assert end <= other.offset or other.offset + other.byte_count <= piece.offset
                held.append(piece)
        elif held:
            held.pop(number % len(held)).release()
    for piece in held:
        piece.release()
        piece.release()  # the second time does nothing
    whole = arena.take(256 << 10, timeout_s=0)
    assert whole is not None
    assert arena.statistics()["pieces"] == 1


def test_a_full_arena_makes_the_next_wait_until_a_piece_comes_back() -> None:
    arena = Arena.private(8192)
    first = arena.take(8192)
    assert first is not None
    assert arena.take(1, timeout_s=0.01) is None
    got: list[Piece | None] = []
    waiter = threading.Thread(target=lambda: got.append(arena.take(4096, timeout_s=60)))
    waiter.start()
    first.release()
    waiter.join()
    assert got[0] is not None
    statistics = arena.statistics()
    assert statistics["timeouts"] == 1
    assert statistics["in_use_bytes"] == 4096


def test_what_can_never_fit_is_refused_at_once() -> None:
    arena = Arena.private(8192)
    with pytest.raises(TooLarge, match="8193 bytes do not fit the arena of 8192"):
        arena.take(8193)
    with pytest.raises(InvalidInput):
        Arena.private(0)


def test_a_piece_ends_with_its_context() -> None:
    arena = Arena.private(4096)
    for _ in range(3):
        piece = arena.take(4096, timeout_s=0)
        assert piece is not None
        with piece:
            piece.view[0] = 1
    assert arena.statistics()["pieces"] == 0


def test_a_shared_arena_is_the_same_memory_for_whoever_has_the_descriptor() -> None:
    arena = Arena.shared(100_000)
    assert arena.fd is not None
    assert arena.byte_count == 102_400
    theirs = Arena.of_descriptor(os.dup(arena.fd), arena.byte_count)
    arena.view[:5] = b"hello"
    assert bytes(theirs.view[:5]) == b"hello"
    child = os.fork()
    if child == 0:
        theirs.view[5:8] = b"you"
        os._exit(0)
    os.waitpid(child, 0)
    assert bytes(arena.view[:8]) == b"helloyou"
    arena.close()
    assert bytes(theirs.view[:5]) == b"hello"
    theirs.close()


def test_a_shared_arena_can_neither_shrink_nor_grow_nor_lose_its_seals() -> None:
    arena = Arena.shared(8192)
    assert arena.fd is not None
    for size in (4096, 16384):
        with pytest.raises(PermissionError):
            os.ftruncate(arena.fd, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(arena.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    arena.close()


def test_a_descriptor_that_could_shrink_or_has_another_size_is_refused() -> None:
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 8192)
    with pytest.raises(InvalidInput, match="could shrink"):
        Arena.of_descriptor(fd, 8192)
    with pytest.raises(InvalidInput, match="8192 bytes, not 4096"):
        Arena.of_descriptor(fd, 4096)
    os.close(fd)


def test_a_descriptor_of_something_else_is_refused(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, 4096)
    with pytest.raises(InvalidInput, match=r"no memfd|could shrink"):
        Arena.of_descriptor(fd, 4096)
    os.close(fd)


def test_without_reserved_huge_pages_a_shared_arena_is_made_of_others() -> None:
    arena = Arena.shared(4 << 20, hugetlb=True)
    assert arena.pages in {"hugetlb", "transparent huge", "4 KiB"}
    arena.view[-1] = 1
    assert arena.statistics()["pages"] == arena.pages
    arena.close()


def test_a_closed_arena_gives_nothing_more_but_its_pieces_stay_readable() -> None:
    arena = Arena.private(8192)
    piece = arena.take(4096)
    assert piece is not None
    piece.view[0] = 5
    arena.close()
    arena.close()
    assert piece.view[0] == 5
    piece.release()
    with pytest.raises(InvalidInput, match="closed"):
        arena.take(1)
