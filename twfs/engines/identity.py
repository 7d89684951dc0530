"""Which weights are these: the part of a layout that engines agree on, from files alone.

A model's files say it, wherever they lie: never a path, a host or a time. Two sets of weights whose
KV must not mix get two revisions. Reads files; no engine is imported.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final

from twfs.errors import InvalidInput
from twfs.layout import NAME_PATTERN
from twfs.units import NAME_BYTES_MAX

SAMPLE_BYTES: Final = 4096
SAMPLES: Final = 3  # of each tensor: its first, middle and last bytes
WHOLE_BYTES: Final = 64 << 20  # a file without tensors that is larger is sampled like one tensor
HEADER_BYTES_MAX: Final = 256 << 20  # of a safetensors file; the largest known has 10 MB
SNAPSHOT: Final = re.compile(r"/snapshots/([0-9a-f]{40})/?$")  # of a hub's cache: names a commit
NAME_ROOM: Final = 16  # bytes of a model's name that are left to the fingerprint
# Where a model came from and which library wrote its config say nothing about its KV.
CONFIG_IGNORED: Final = frozenset({"_name_or_path", "transformers_version", "architectures"})
WEIGHTS: Final = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")


def name_of_model(given: str) -> str:
    """Return a model's name for the mount: the last part of a path, both of a hub's name."""
    parts = [part for part in given.rstrip("/").split("/") if part not in {"", ".", ".."}]
    parts = parts[-1:] if given.startswith(("/", ".")) else parts[-2:]
    name = re.sub(r"[^A-Za-z0-9._=-]", "_", "--".join(parts) or "model").lstrip(".-") or "model"
    name = name[: NAME_BYTES_MAX - NAME_ROOM]
    return name if NAME_PATTERN.fullmatch(name) else "model"


def config_hash(config: Mapping[str, Any]) -> str:
    """Return 16 hex digits for a *config* as the engine uses it, overrides and all."""
    kept = {name: value for name, value in config.items() if name not in CONFIG_IGNORED}
    text = json.dumps(kept, sort_keys=True, default=str).encode()
    return hashlib.sha256(text).hexdigest()[:16]


def revision_of_files(model: str | Path) -> str:
    """Return 32 hex digits that name the weights in the directory or file *model*.

    Of a hub's snapshot it is the commit. Else it is a hash of each file's size, of safetensors'
    headers, and of the first, middle and last 4 KiB of every tensor: seconds for the largest
    models. InvalidInput if there are no weights.
    """
    path = Path(model)
    commit = SNAPSHOT.search(str(path))
    if commit:
        return commit.group(1)[:32]
    files = [path] if path.is_file() else sorted({f for kind in WEIGHTS for f in path.glob(kind)})
    if not files:
        raise InvalidInput(
            f"{path} holds no weights, so their KV cannot be told from others': give the path of a "
            "downloaded model, or its revision by name"
        )
    state = hashlib.sha256()
    for index in sorted(path.glob("*.index.json")) if path.is_dir() else []:
        state.update(index.read_bytes())
    for file in files:
        state.update(f"\0{file.name} {file.stat().st_size}\0".encode())
        with file.open("rb", buffering=0) as weights:
            for offset, length in _samples_of(file, weights):
                state.update(os.pread(weights.fileno(), length, offset))
    return state.hexdigest()[:32]


def _samples_of(file: Path, weights: BinaryIO) -> Iterator[tuple[int, int]]:
    """Yield (offset, length) of what is hashed of one file."""
    size = file.stat().st_size
    if file.suffix != ".safetensors":
        yield from [(0, size)] if size <= WHOLE_BYTES else _spread(0, size)
        return
    header_bytes = int.from_bytes(os.pread(weights.fileno(), 8, 0), "little")
    if not 0 < header_bytes <= min(HEADER_BYTES_MAX, size):
        raise InvalidInput(f"{file} is no safetensors file: its header has {header_bytes} bytes")
    yield 0, 8 + header_bytes
    try:
        tensors = json.loads(os.pread(weights.fileno(), header_bytes, 8))
        places = sorted(
            tuple(tensor["data_offsets"]) for name, tensor in tensors.items() if name[:2] != "__"
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidInput(f"{file} is no safetensors file: {error}") from error
    for begin, end in places:
        yield from _spread(8 + header_bytes + begin, end - begin)


def _spread(offset: int, length: int) -> Iterator[tuple[int, int]]:
    """Yield the first, middle and last pieces of a run, all of a short one."""
    if length <= SAMPLES * SAMPLE_BYTES:
        yield offset, length
        return
    for number in range(SAMPLES):
        yield offset + (length - SAMPLE_BYTES) * number // (SAMPLES - 1), SAMPLE_BYTES
