"""What the command line of `twfs replay` means: spans of time, capacities, maps of sessions."""

import os
import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Final

import msgspec

from twfs.config import Config, parse
from twfs.errors import InvalidInput
from twfs.hints import Retention
from twfs.warehouse import Warehouse
from twfs_tools.output import parse_size
from twfs_tools.replay.traces import Session

SPAN: Final = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,6})?)(s|m|min|h|d)")
SPAN_S: Final = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86_400}
PART: Final = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,6})?)\s*%")
SEEDS_MAX: Final = 1000
TENANTS_MAX: Final = 1000
DEFAULT_POLICY: Final = "default"  # whatever a warehouse without settings has


def seconds_of(text: str) -> float:
    """The seconds of "90s", "30m", "1h" or "1d"; InvalidInput."""
    if text == "0":
        return 0.0
    match = SPAN.fullmatch(text.strip())
    if match is None:
        raise InvalidInput(f"{text!r} is no span of time: write 90s, 30m, 1h or 1d")
    return float(match[1]) * SPAN_S[match[2]]


def seeds_of(text: str) -> list[int]:
    """The seeds of "5" (1 to 5), "7-9" or "3,8"; InvalidInput."""
    try:
        if "," in text:
            found = [int(each) for each in text.split(",")]
        elif "-" in text:
            low, _, high = text.partition("-")
            found = list(range(int(low), int(high) + 1))
        else:
            found = list(range(1, int(text) + 1))
    except ValueError:
        found = []
    if not 1 <= len(found) <= SEEDS_MAX or min(found) < 0:
        raise InvalidInput(f"{text!r} names no seeds: write 5 (for 1 to 5), 7-9 or 3,8")
    return found


def blocks_of(text: str, unique_blocks: int, block_bytes: int) -> int:
    """The blocks of a capacity: "25%" of the footprint, or modelled bytes ("20T"); InvalidInput."""
    match = PART.fullmatch(text.strip())
    blocks = (
        round(float(match[1]) / 100 * unique_blocks)
        if match is not None
        else parse_size(text) // block_bytes
    )
    if blocks < 1:
        raise InvalidInput(
            f"a capacity of {text} is less than one block of {block_bytes} modelled bytes: give "
            "more, as 25% of all blocks or as 20T"
        )
    return blocks


def pairs_of(texts: Sequence[str], what: str) -> list[tuple[str, str]]:
    """The (pattern, value) of each "PATTERN=VALUE"; InvalidInput."""
    found = []
    for text in texts:
        pattern, equals, value = text.rpartition("=")
        if not equals or not pattern or not value:
            raise InvalidInput(f"{text!r} is not PATTERN={what}, as trace_00*={what.lower()}")
        found.append((pattern, value))
    return found


def class_map(texts: Sequence[str]) -> Callable[[str], Retention | None]:
    """The class of a session's name, by the first of "PATTERN=CLASS" that fits; InvalidInput."""
    pairs = []
    for pattern, name in pairs_of(texts, "CLASS"):
        try:
            pairs.append((pattern, Retention(name)))
        except ValueError as error:
            raise InvalidInput(f"{name!r} is no class: there are {', '.join(Retention)}") from error
    return lambda name: next((each for pattern, each in pairs if fnmatchcase(name, pattern)), None)


def tenant_map(
    sessions: Sequence[Session], count: int, texts: Sequence[str]
) -> Callable[[str], str]:
    """The tenant of a session's name: by "PATTERN=TENANT", else one of *count* by turns."""
    pairs = pairs_of(texts, "TENANT")
    if not 0 <= count <= TENANTS_MAX:
        raise InvalidInput(f"a replay has up to {TENANTS_MAX} tenants, not {count}")
    turns = {
        session.name: f"tenant{number % count + 1}" if count else ""
        for number, session in enumerate(sorted(sessions, key=lambda each: each.name))
    }
    return lambda name: next(
        (tenant for pattern, tenant in pairs if fnmatchcase(name, pattern)), turns.get(name, "")
    )


def settings_with(text: bytes, where: str, policy: str) -> Config:
    """The settings in the TOML *text*, with another policy of eviction; InvalidInput."""
    config = parse(text, where)
    if policy == DEFAULT_POLICY:
        return config
    document = msgspec.to_builtins(config)
    document.setdefault("eviction", {})["policy"] = policy
    try:
        return msgspec.convert(document, Config)
    except msgspec.ValidationError as error:
        raise InvalidInput(f"--policy {policy}: {error}") from error


def numbers_of(texts: Sequence[str], what: str) -> dict[str, int]:
    """The size of each "NAME=SIZE"; InvalidInput."""
    return {name: parse_size(value) for name, value in pairs_of(texts, what)}


def tenants_made(
    names: Sequence[str], quotas: dict[str, int], weights: dict[str, int]
) -> Callable[[Warehouse], None]:
    """What enters the tenants *names* into a warehouse; *quotas* in bytes of its devices."""

    def prepare(warehouse: Warehouse) -> None:
        uid = os.geteuid()
        for name in filter(None, names):
            warehouse.operate(
                "tenant-add", name=name, owner=uid, uids=[uid], quota_bytes=quotas.get(name),
                weight=weights.get(name, 1),
            )  # fmt: skip

    return prepare
