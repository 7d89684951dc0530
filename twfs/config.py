"""The settings of a warehouse: one TOML file, `twfs.toml` in its directory, read when it is opened.

Everything has a default, so that no file is needed. What is unknown or malformed is refused in a
sentence: a setting that was misspelt must not be the default in silence. A section belongs to the
module that acts on it; it is checked here, where it enters.
"""

import re
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta, Struct, field

from twfs.errors import InvalidInput
from twfs.hints import Retention
from twfs.units import Millis

CONFIG_FILE: Final = "twfs.toml"
CONFIG_BYTES_MAX: Final = 1 << 20  # a bound for what parsing may take; thousands of lines
UNIT_MS: Final = {"s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000, "w": 604_800_000}
_DURATION: Final = re.compile(r"([0-9]{1,9})([smhdw])")

Duration = Annotated[str, Meta(max_length=16)]  # "90s", "1h", "30d"; "never"
Share = Annotated[float, Meta(ge=0, le=1)]  # of the space of all devices

Rate = Annotated[float, Meta(gt=0, le=1e9)]  # tokens a second


class Class(Struct, frozen=True, forbid_unknown_fields=True):
    """One retention class; what is not given is the default of that class."""

    ttl: Duration | None = None
    share: Share | None = None


class RetentionSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """[retention.*]: how long what is kept, and how much of it."""

    ephemeral: Class = Class()
    standard: Class = Class()
    durable: Class = Class()
    pinned: Class = Class()


class EvictionSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """[eviction]: which blocks of a class go first; see policy/scoring.py."""

    policy: Literal["reuse", "lru"] = "reuse"
    attention_tokens: Annotated[int, Meta(ge=0, le=1 << 24)] = 0


class AdmissionSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """[admission]: which blocks are written at all; see policy/admission.py."""

    second_touch: tuple[Retention, ...] = ()  # classes whose blocks are kept if offered twice
    remembered_names: Annotated[int, Meta(ge=1024, le=1 << 28)] = 1 << 20
    bytes_per_day: Annotated[int, Meta(ge=1)] | None = None  # written to the devices
    drive_writes_per_day: Annotated[float, Meta(gt=0, le=1000)] | None = None  # of their space

    def budget_bytes_per_day(self, total_bytes: int) -> int | None:
        """What may be written to *total_bytes* of devices in a day; None: as much as comes."""
        budgets = [] if self.bytes_per_day is None else [self.bytes_per_day]
        if self.drive_writes_per_day is not None:
            budgets.append(max(1, int(self.drive_writes_per_day * total_bytes)))
        return min(budgets, default=None)


class RecordSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """[record]: what is noted of requests for `twfs advise`; see policy/recording.py."""

    on: bool = True
    bytes: Annotated[int, Meta(ge=1 << 22, le=1 << 30)] = 64 << 20  # of the record, at most
    days: Annotated[int, Meta(ge=1, le=365)] = 7  # that it reaches back, at least


class Config(Struct, frozen=True, forbid_unknown_fields=True):
    """All of the file."""

    retention: RetentionSettings = field(default_factory=RetentionSettings)
    prefill: dict[str, Rate] = field(default_factory=dict)  # by model; "*" is of all others
    eviction: EvictionSettings = field(default_factory=EvictionSettings)
    admission: AdmissionSettings = field(default_factory=AdmissionSettings)
    record: RecordSettings = field(default_factory=RecordSettings)


DEFAULT_TTL: Final = {
    Retention.EPHEMERAL: "1h",
    Retention.STANDARD: "never",
    Retention.DURABLE: "30d",
    Retention.PINNED: "never",
}
DEFAULT_SHARE: Final = {
    Retention.EPHEMERAL: 1.0,
    Retention.STANDARD: 1.0,
    Retention.DURABLE: 1.0,
    Retention.PINNED: 0.5,  # so that a put of others finds room, whatever has been pinned
}


def duration_ms(text: str) -> Millis | None:
    """The milliseconds of "90s", "15m", "1h", "30d" or "2w"; None for "never". InvalidInput."""
    if text == "never":
        return None
    match = _DURATION.fullmatch(text)
    if match is None:
        raise InvalidInput(
            f"{text!r} is no duration: write a whole number and s, m, h, d or w, or never"
        )
    return Millis(int(match[1]) * UNIT_MS[match[2]])


def parse(data: bytes, where: str = CONFIG_FILE) -> Config:
    """The settings in *data*, TOML; InvalidInput says what of it is wrong, and *where*."""
    if len(data) > CONFIG_BYTES_MAX:
        raise InvalidInput(f"{where} has {len(data)} bytes; at most {CONFIG_BYTES_MAX} are read")
    try:
        config = msgspec.toml.decode(data, type=Config)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise InvalidInput(f"{where}: {error}") from error
    for retention in Retention:
        given: Class = getattr(config.retention, retention)
        if given.ttl is not None:
            try:
                duration_ms(given.ttl)
            except InvalidInput as error:
                raise InvalidInput(f"{where}: [retention.{retention}] ttl: {error}") from error
    kept = {Retention.DURABLE, Retention.PINNED} & set(config.admission.second_touch)
    if kept:
        raise InvalidInput(
            f"{where}: [admission] second_touch names {', '.join(sorted(kept))}: what is promised "
            "is always let in; name ephemeral or standard"
        )
    if config.retention.pinned.ttl not in {None, "never"}:
        raise InvalidInput(f"{where}: [retention.pinned] has a ttl, but pinned blocks never go")
    return config


def load(path: Path) -> Config:
    """The settings in the file at *path*; InvalidInput if it cannot be read or understood."""
    try:
        with path.open("rb") as file:
            data = file.read(CONFIG_BYTES_MAX + 1)
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read: {error.strerror}") from error
    return parse(data, str(path))


def settings_of(directory: Path) -> Config:
    """The settings of the warehouse in *directory*: those of its file, else the defaults."""
    path = directory / CONFIG_FILE
    return load(path) if path.exists() else Config()
