"""What the bytes of a block mean: model identity, dtype, groups of layers, block and shard sizes.

Two layouts with the same fingerprint are interchangeable byte for byte; anything that changes the
meaning of the bytes changes the fingerprint. Host, engine instance and data-parallel rank never
take part.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

from twfs.errors import InvalidInput
from twfs.units import BLOCK_BYTES_MAX, NAME_BYTES_MAX, ByteCount

NAME_PATTERN: Final = re.compile(rf"^[A-Za-z0-9_=][A-Za-z0-9._=-]{{0,{NAME_BYTES_MAX - 1}}}$")
SHARDS_MAX: Final = 1024
GROUPS_MAX: Final = 64
LAYERS_MAX: Final = 256  # of one group: the block header has room for that many layer checksums
FILES_NAME: Final = "files"  # the model of the mounted files' blocks: no user opens it
DTYPE_BITS: Final[Mapping[str, int]] = {
    "float64": 64, "float32": 32, "float16": 16, "bfloat16": 16,
    "float8_e4m3fn": 8, "float8_e5m2": 8, "float8_e4m3fnuz": 8, "float8_e5m2fnuz": 8,
    "float4_e2m1fn_x2": 4, "int8": 8, "uint8": 8, "int4": 4,
}  # fmt: skip


# What JSON may bring for each field. Other kinds would pass the comparisons of sizes (16.0, true),
# and fail where nobody expects it.
_TEXT: Final = (str,)
_NUMBER: Final = (int,)
_MAYBE_NUMBER: Final = (int, type(None))
_GROUP_KINDS: Final[Mapping[str, tuple[type, ...]]] = {
    "kind": _TEXT, "layers": _NUMBER, "kv_heads": _NUMBER, "head_size": _NUMBER, "dtype": _TEXT,
    "arrangement": _TEXT, "window_tokens": _MAYBE_NUMBER, "layer_bytes": _MAYBE_NUMBER,
}  # fmt: skip
_LAYOUT_KINDS: Final[Mapping[str, tuple[type, ...]]] = {
    "model": _TEXT, "revision": _TEXT, "block_tokens": _NUMBER, "shards": _NUMBER,
    "replicated": (bool,), "engine": _TEXT, "overrides": (dict,), "groups": (list,),
}  # fmt: skip


def _checked_kinds(
    data: Mapping[str, Any], kinds: Mapping[str, tuple[type, ...]]
) -> Mapping[str, Any]:
    """Return *data* if its fields are known, and of their kinds; TypeError."""
    for name, value in data.items():
        if name not in kinds:
            raise TypeError(f"there is no field {name!r}")
        if type(value) not in kinds[name]:
            raise TypeError(f"{name} is {value!r:.80}")
    return data


def check_model_name(name: str) -> str:
    """Return *name* if it may name a model (and so a directory), else raise InvalidInput."""
    if not NAME_PATTERN.fullmatch(name) or name == "detached":
        raise InvalidInput(
            f"{name!r} cannot name a model: use 1 to {NAME_BYTES_MAX} of A-Z a-z 0-9 . _ = -, "
            "not starting with . or - (write meta-llama--Llama-3-8B for meta-llama/Llama-3-8B)"
        )
    return name


def check_own_name(name: str) -> str:
    """Return *name* if a user may open a model of that name, else raise InvalidInput."""
    if name == FILES_NAME:
        raise InvalidInput(f"{name!r} cannot name a model: it is the tree of files in the mount")
    return check_model_name(name)


class GroupKind(StrEnum):
    """Which blocks of a group a match needs."""

    FULL = "full"  # every block of the prefix
    WINDOW = "window"  # those of the last `window_tokens` before the boundary
    STATE = "state"  # the one that ends at the boundary (Mamba, linear attention)


class Arrangement(StrEnum):
    """Order of the dimensions inside a payload, outermost first; only equality matters to twfs.

    When `layer` is outermost a range of layers is one run of bytes, and can be read alone.
    """

    LAYER_KV_HEAD_TOKEN = "layer,kv,head,token,dim"  # transformers' DynamicCache
    LAYER_KV_TOKEN_HEAD = "layer,kv,token,head,dim"  # vLLM LBHNC page by page
    TOKEN_OUTERMOST = "token,layer,kv,head,dim"
    LAYER_LATENT = "layer,token,dim"  # MLA: one latent per token, no K/V pair
    LAYER_OPAQUE = "layer,bytes"  # `layer_bytes` per layer, meaning known to the engine
    OPAQUE = "bytes"  # the engine's own order; no partial reads
    ANY_LENGTH = "bytes,any"  # of the mounted files: up to `layer_bytes`, as many as there are


@dataclass(frozen=True, slots=True)
class Group:
    """Layers that are cached alike.

    *kv_heads* is the number over all shards; each shard holds an equal part of them unless the
    layout is replicated. *layer_bytes* replaces the computed size of one layer of one block and
    shard (state groups, packed formats, MLA with scales).
    """

    layers: int
    kv_heads: int = 1
    head_size: int = 1
    dtype: str = "bfloat16"
    kind: GroupKind = GroupKind.FULL
    arrangement: Arrangement = Arrangement.LAYER_KV_HEAD_TOKEN
    window_tokens: int | None = None
    layer_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Layout:
    """The layout of one model; see the module's docstring.

    *model* and *revision* identify the weights (a hub name and commit, or a hash of config and
    safetensors index); *overrides* holds what changes the KV under the same weights (rope scaling,
    quantisation, KV scales); *engine* names the engine's KV format.
    """

    model: str
    groups: tuple[Group, ...]
    block_tokens: int
    revision: str = ""
    shards: int = 1
    replicated: bool = False
    engine: str = "raw"
    overrides: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 16 <= self.block_tokens <= 4096:
            raise InvalidInput(f"block_tokens is {self.block_tokens}; it must be 16 to 4096")
        if not 1 <= self.shards <= SHARDS_MAX:
            raise InvalidInput(f"shards is {self.shards}; it must be 1 to {SHARDS_MAX}")
        if self.replicated and self.shards != 1:
            raise InvalidInput("a replicated layout (MLA) has one shard: every rank reads the same")
        if not 1 <= len(self.groups) <= GROUPS_MAX:
            raise InvalidInput(f"a layout has 1 to {GROUPS_MAX} groups, not {len(self.groups)}")
        if all(group.kind is not GroupKind.FULL for group in self.groups):
            raise InvalidInput("a layout needs a group of kind full: declare window layers as full")
        for index, group in enumerate(self.groups):
            self._check_group(index, group)

    def _check_group(self, index: int, group: Group) -> None:
        """Raise InvalidInput for sizes that cannot be."""
        if not 1 <= group.layers <= LAYERS_MAX or group.kv_heads < 1 or group.head_size < 1:
            raise InvalidInput(
                f"group {index} needs 1 to {LAYERS_MAX} layers, >= 1 KV head and head size"
            )
        if group.dtype not in DTYPE_BITS:
            raise InvalidInput(
                f"group {index} has dtype {group.dtype!r}; known are {', '.join(DTYPE_BITS)}"
            )
        if (group.kind is GroupKind.WINDOW) != (group.window_tokens is not None):
            raise InvalidInput(
                f"group {index}: window_tokens goes with kind window, and only there"
            )
        if group.window_tokens is not None and group.window_tokens < 1:
            raise InvalidInput(f"group {index} has a window of {group.window_tokens} tokens")
        needs_bytes = group.kind is GroupKind.STATE or group.arrangement in {
            Arrangement.LAYER_OPAQUE,
            Arrangement.OPAQUE,
            Arrangement.ANY_LENGTH,
        }
        if needs_bytes and group.layer_bytes is None:
            raise InvalidInput(f"group {index} needs layer_bytes: its size has no formula")
        if group.layer_bytes is None and group.kv_heads % self.shards:
            raise InvalidInput(
                f"group {index}: {group.kv_heads} KV heads cannot be cut into {self.shards} shards"
            )
        if not 1 <= self.block_bytes(index) <= BLOCK_BYTES_MAX:
            raise InvalidInput(
                f"a block of group {index} would take {self.block_bytes(index)} bytes; "
                f"at most {BLOCK_BYTES_MAX} are allowed: use fewer block_tokens or more shards"
            )

    def layer_bytes(self, group: int) -> ByteCount:
        """Payload bytes of one layer of one block and shard of *group*."""
        of = self.groups[group]
        if of.layer_bytes is not None:
            return ByteCount(of.layer_bytes)
        tensors = 1 if of.arrangement is Arrangement.LAYER_LATENT else 2
        values = tensors * self.block_tokens * (of.kv_heads // self.shards) * of.head_size
        return ByteCount(math.ceil(values * DTYPE_BITS[of.dtype] / 8))

    def block_bytes(self, group: int = 0) -> ByteCount:
        """Payload bytes of one block and shard of *group*, all its layers: at most, if any fit."""
        return ByteCount(self.groups[group].layers * self.layer_bytes(group))

    def any_length(self, group: int) -> bool:
        """Tell whether blocks of *group* have from 1 to block_bytes, and not exactly so many."""
        return self.groups[group].arrangement is Arrangement.ANY_LENGTH

    def fits(self, group: int, payload_bytes: int) -> bool:
        """Tell whether a block of *group* may have *payload_bytes*."""
        if self.any_length(group):
            return 1 <= payload_bytes <= self.block_bytes(group)
        return payload_bytes == self.block_bytes(group)

    def summed_layers(self, group: int) -> int:
        """Layers that have a checksum of their own, 0 where a layer is not one run of bytes."""
        outermost = self.groups[group].arrangement.value.split(",", maxsplit=1)[0]
        return self.groups[group].layers if outermost == "layer" else 0

    @property
    def spine(self) -> int:
        """The first full group: its shard 0 stands for a block in listings and chains."""
        return next(i for i, group in enumerate(self.groups) if group.kind is GroupKind.FULL)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready form, from which from_dict makes an equal layout."""
        return {
            "model": self.model,
            "revision": self.revision,
            "block_tokens": self.block_tokens,
            "shards": self.shards,
            "replicated": self.replicated,
            "engine": self.engine,
            "overrides": dict(sorted(self.overrides.items())),
            "groups": [
                {
                    "kind": group.kind.value,
                    "layers": group.layers,
                    "kv_heads": group.kv_heads,
                    "head_size": group.head_size,
                    "dtype": group.dtype,
                    "arrangement": group.arrangement.value,
                    "window_tokens": group.window_tokens,
                    "layer_bytes": group.layer_bytes,
                }
                for group in self.groups
            ],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Layout":
        """Make a layout of *data* (as from JSON); InvalidInput names what does not fit."""
        try:
            _checked_kinds(data, _LAYOUT_KINDS)
            overrides = data.get("overrides", {})
            _checked_kinds(overrides, dict.fromkeys(overrides, _TEXT))
            groups = tuple(
                Group(
                    **{
                        **_checked_kinds(group, _GROUP_KINDS),
                        "kind": GroupKind(group.get("kind", "full")),
                        "arrangement": Arrangement(group["arrangement"]),
                    }
                )
                for group in data["groups"]
            )
            return cls(**{**data, "groups": groups})
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise InvalidInput(f"not a layout: {error}") from error

    def canonical(self) -> bytes:
        """The bytes that the fingerprint is taken of: sorted, compact JSON."""
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":")).encode()

    @property
    def fingerprint(self) -> bytes:
        """SHA-256 of the canonical form, 32 bytes."""
        return hashlib.sha256(b"twfs layout 1\0" + self.canonical()).digest()

    def differences(self, other: "Layout") -> str:
        """Say in one line what differs, field by field, as `field: mine / theirs`."""
        mine, theirs = self.to_dict(), other.to_dict()
        return "; ".join(
            f"{name}: {mine[name]!r} / {theirs[name]!r}"
            for name in mine
            if mine[name] != theirs[name]
        )
