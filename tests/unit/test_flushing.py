"""Whoever waits for a flush gets one that began after it asked, or that flush's error."""

import threading

import pytest

from twfs.devices.device import Device
from twfs.devices.flushing import Flusher
from twfs.errors import DeviceError


class SlowDevice:
    """Stands in for the drive: a flush ends, well or not, when the test says so."""

    def __init__(self) -> None:
        self.begun = threading.Semaphore(0)
        self.end = threading.Semaphore(0)
        self.flushes = 0
        self.failing: set[int] = set()

    def flush(self) -> None:
        self.flushes += 1
        number = self.flushes
        self.begun.release()
        self.end.acquire()
        if number in self.failing:
            raise DeviceError(f"flush {number}")


def flusher_of(device: SlowDevice) -> Flusher:
    as_device: Device = device  # type: ignore[assignment] # flush is all that is asked of it
    return Flusher(as_device)


def test_those_who_ask_during_a_flush_share_the_next_one() -> None:
    device = SlowDevice()
    flusher = flusher_of(device)
    first = threading.Thread(target=flusher.flush)
    first.start()
    device.begun.acquire()
    others = [threading.Thread(target=flusher.flush) for _ in range(5)]
    for thread in others:
        thread.start()
    while flusher.statistics()["flushes_asked"] < 6:
        device.begun.acquire(timeout=0.001)
    device.end.release()
    first.join()  # its own flush is enough for it
    device.begun.acquire()
    assert device.flushes == 2
    device.end.release()
    for thread in others:
        thread.join()
    assert flusher.statistics() == {"flushes_asked": 6, "flushes_done": 2}


def test_a_failed_flush_fails_all_it_was_for_and_nobody_later() -> None:
    device = SlowDevice()
    device.failing = {2}
    flusher = flusher_of(device)
    failed: list[str] = []

    def work() -> None:
        try:
            flusher.flush()
        except DeviceError as error:
            failed.append(str(error))

    first = threading.Thread(target=work)
    first.start()
    device.begun.acquire()
    others = [threading.Thread(target=work) for _ in range(3)]
    for thread in others:
        thread.start()
    while flusher.statistics()["flushes_asked"] < 4:
        device.begun.acquire(timeout=0.001)
    device.end.release(2)
    for thread in (first, *others):
        thread.join()
    assert failed == ["flush 2"] * 3
    device.end.release()
    flusher.flush()
    device.failing = {4}
    device.end.release()
    with pytest.raises(DeviceError):
        flusher.flush()
