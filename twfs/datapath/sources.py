"""How this process itself reads the devices of its warehouse: descriptors that follow them.

As a client does over its socket; see protocol/link.py. Thread-safe.
"""

import os
import threading
from contextlib import suppress
from functools import partial

from twfs.devices.device import Device
from twfs.devices.standing import Standings
from twfs.errors import TwfsError
from twfs.readers.select import DeviceSource, Readers
from twfs.units import DeviceIndex


class Sources:
    """The readers of this process; `now` brings them up to date with the devices."""

    def __init__(self, standings: Standings) -> None:
        self._standings = standings
        self._lock = threading.Lock()
        self._serial = standings.serial
        self._of: dict[DeviceIndex, tuple[Device, DeviceSource]] = {}
        try:
            for device in standings.devices.values():
                self._of[device.index] = (device, _source_of(device))
        except BaseException:
            self._close_all()
            raise
        self._readers = Readers({index: source for index, (_, source) in self._of.items()})

    def now(self) -> Readers:
        """Return the readers, able to read all devices that are there."""
        if self._serial != self._standings.serial:
            with self._lock:
                self._follow()
        return self._readers

    def _follow(self) -> None:
        """Open what has come, and let go of what has gone. Hold the lock."""
        serial = self._standings.serial
        devices = self._standings.devices
        gone = []
        for index, (device, source) in list(self._of.items()):
            if devices.get(index) is not device:
                gone.append(source)
                del self._of[index]
        for device in devices.values():
            if device.index not in self._of:
                with suppress(TwfsError):  # it may have gone meanwhile: its blocks are misses
                    self._of[device.index] = (device, _source_of(device))
        self._readers.follow(
            {index: source for index, (_, source) in self._of.items()},
            [partial(os.close, source.fd) for source in gone],
        )
        self._serial = serial

    def close(self) -> None:
        """Wait for reads under way and let go of everything."""
        self._readers.close()
        with self._lock:
            self._close_all()

    def _close_all(self) -> None:
        while self._of:
            os.close(self._of.popitem()[1][1].fd)


def _source_of(device: Device) -> DeviceSource:
    """Open *device* for reading."""
    return DeviceSource(device.open_for_reader(), device.path, device.size_bytes)
