"""Blocks, sessions and statistics as text: extended attributes, JSON, metrics lines.

Pure functions, any thread.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from twfs.records import payload_runs
from twfs.store import BlockInfo, ModelInfo
from twfs.units import DeviceIndex
from twfs.vfs.chainfile import retention_of

PREFIX: Final = "user.twfs."
CLASS_NAME: Final = f"{PREFIX}class"


def _named(values: Mapping[str, object]) -> dict[str, bytes]:
    return {f"{PREFIX}{name}": str(value).encode() for name, value in values.items()}


def describe_block(
    model: ModelInfo, info: BlockInfo, tenant: str, paths: Mapping[DeviceIndex, Path]
) -> dict[str, bytes]:
    """Return the extended attributes of a block's file; *paths* are of the devices."""
    block, sums = info.block, info.block.checksums
    return _named(
        {
            "hash": info.key.prefix_hash.hex(),
            "parent": block.parent.hex(),
            "digest": block.digest.hex(),
            "checksum": sums.xxh3.hex(),
            "lanes": f"{sums.lane_plain:016x} {sums.lane_weighted:016x}",
            "extents": " ".join(map(str, block.extents)),
            "payload": " ".join(
                f"{paths.get(run.device, '/dev/null')}:{run.offset}+{run.length}"
                for run in payload_runs(block.extents, block.payload_bytes)
            ),
            "class": retention_of(block.retention).value,
            "tenant": tenant,
            "layout": model.layout.fingerprint.hex(),
            "index": info.index,
            "position": block.position,
            "generation": block.generation,
        }
    )


def describe_session(model: ModelInfo, info: BlockInfo, tenant: str) -> dict[str, bytes]:
    """Return the extended attributes of a session's directory, of the block it ends with."""
    blocks = info.index + 1
    return _named(
        {
            "hash": info.key.prefix_hash.hex(),
            "tokens": info.block.position or blocks * model.layout.block_tokens,
            "blocks": blocks,
            "class": retention_of(info.block.retention).value,
            "tenant": tenant,
            "layout": model.layout.fingerprint.hex(),
            "epoch": model.epoch,
        }
    )


def pretty(value: Any) -> bytes:
    """Return *value* as indented JSON with a line end."""
    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"


def _numbers(name: str, value: Any) -> Iterator[tuple[str, int | float]]:
    if isinstance(value, bool | int | float):
        yield name, value if isinstance(value, float) else int(value)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _numbers(f"{name}_{key}", inner)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _numbers(f"{name}_{index}", inner)


def _of_tenants(figures: Mapping[str, Any]) -> Iterator[str]:
    """What is metered as lines `twfs_tenant_name{tenant="...",...} value`."""
    rows = [{"tenant": name, **charged} for name, charged in figures["charged"].items()]
    rows += [*figures["metered"], *figures["reads"]]
    rows += [{"model": name, **rate} for name, rate in figures["prefill_rates"].items()]
    for row in rows:
        texts = {key: value for key, value in row.items() if isinstance(value, str)}
        labels = ",".join(
            f"{key}={msgspec.json.encode(text).decode()}" for key, text in texts.items()
        )
        for key, value in row.items():
            if isinstance(value, int | float):
                yield f"twfs_tenant_{key}{{{labels}}} {value}\n"


def metrics(statistics: Mapping[str, Any]) -> bytes:
    """Return every number of *statistics* as a line `twfs_name value`, as Prometheus reads them.

    What is of tenants, models and classes has these as labels.
    """
    lines: list[str] = []
    tenants = statistics.get("tenants")
    if tenants is not None:
        lines += _of_tenants(tenants)
        statistics = {name: value for name, value in statistics.items() if name != "tenants"}
    for name, number in _numbers("twfs", statistics):
        safe = "".join(c if c.isascii() and (c.isalnum() or c == "_") else "_" for c in name)
        lines.append(f"{safe} {number}\n")
    return "".join(lines).encode()
