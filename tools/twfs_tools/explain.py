"""`twfs explain`: how much of a prompt the warehouse holds, and why no more."""

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from twfs.errors import InvalidInput
from twfs.prefix import Names
from twfs.store import BlockInfo
from twfs.units import PrefixHash
from twfs_tools.output import JsonFlag, print_json, say
from twfs_tools.target import (
    SocketOption,
    TenantOption,
    WarehouseArgument,
    model_named,
    opened,
    parse_hash,
)


def explain(
    warehouse: WarehouseArgument,
    model: Annotated[str, typer.Argument(help="The model.")],
    tokens: Annotated[
        Path | None, typer.Option("--tokens", help="Token ids: a JSON list, or raw u32.")
    ] = None,
    prefix: Annotated[
        str | None, typer.Option("--hash", help="A prefix hash, 32 hex digits.")
    ] = None,
    salt: Annotated[
        str, typer.Option("--salt", help="What the engine adds to the names, hex digits.")
    ] = "",
    *,
    tenant: TenantOption = None,
    socket: SocketOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Say which blocks of a prompt (or of a stored prefix) hit, and the cause of the first miss."""
    if (tokens is None) == (prefix is None):
        raise InvalidInput("give either --tokens or --hash")
    ids = read_tokens(tokens) if tokens is not None else None
    wanted = parse_hash(prefix) if prefix is not None else PrefixHash(b"")
    with opened(warehouse, socket) as store:
        info = model_named(store, model)
        if ids is not None:
            opened_for = store.open_model(model, tenant=tenant)
            number, names = opened_for.tenant, opened_for.chain(_salt(salt)).extend(ids).names()
        else:
            blocks = store.chain_of(info.id, wanted)
            number, names = blocks[-1].block.charged, names_of_blocks(blocks, info.layout.spine)
        found = store.explain(info.id, names, tenant=number)
    if as_json:
        print_json({
            "model": model, "block_tokens": info.layout.block_tokens,
            "tenant": number, "tokens": None if ids is None else len(ids), "explanation": found,
        })  # fmt: skip
        return
    say(f"{found.hit_blocks:,} of {found.asked_blocks:,} blocks hit ({found.hit_tokens:,} tokens)")
    if found.first_miss is not None:
        say(f"block {found.hit_blocks} ({found.first_miss.hex()}) misses: {found.cause}")
    else:
        say(found.cause)
    if ids is not None and len(ids) % info.layout.block_tokens:
        rest = len(ids) % info.layout.block_tokens
        say(f"the last {rest} tokens are no whole block of {info.layout.block_tokens}")


def read_tokens(path: Path) -> "list[int] | np.ndarray[tuple[int], np.dtype[np.uint32]]":
    """Return the token ids in *path*, a JSON list or raw u32 little-endian; InvalidInput."""
    data = path.read_bytes()
    try:
        ids = json.loads(data)
    except ValueError:
        if not data or len(data) % 4:
            raise InvalidInput(
                f"{path} holds no token ids: neither a JSON list nor {len(data)} bytes of whole u32"
            ) from None
        return np.frombuffer(data, "<u4")
    if not isinstance(ids, list) or not all(type(each) is int for each in ids):
        raise InvalidInput(f"{path} holds no token ids: a JSON list of integers is wanted")
    return ids


def _salt(text: str) -> bytes:
    """Return the salt that hex digits mean; InvalidInput."""
    try:
        return bytes.fromhex(text)
    except ValueError as error:
        raise InvalidInput(f"--salt {text!r} is not hex digits") from error


def names_of_blocks(blocks: list[BlockInfo], group: int) -> Names:
    """Return the names of a stored chain: its blocks of *group*, shard 0, in order."""
    spine = [each for each in blocks if each.key.group == group and each.key.shard == 0]
    keys = tuple(each.block.key for each in spine)
    return Names(
        b"".join(each.key.prefix_hash for each in spine),
        b"".join(each.block.digest for each in spine),
        b"".join(each.block.parent for each in spine),
        tuple(each.block.position for each in spine),
        keys if any(keys) else (),
    )
