"""The warehouse's secret: what headers and rosters are sealed with, and tenants' salts come from.

32 random bytes, made once. They lie in the metadata and in a file beside it, both for the daemon
alone, and never on a device: whoever may read the devices could else forge what a rebuild believes.
"""

import hashlib
import os
from contextlib import suppress
from pathlib import Path
from typing import Final

from twfs.errors import InvalidInput, NotAllowed

SECRET_BYTES: Final = 32
SECRET_FILE: Final = "secret"
MAC_BYTES: Final = 16
SALT_BYTES: Final = 32


def make_secret() -> bytes:
    """Return a secret that nobody can guess."""
    return os.urandom(SECRET_BYTES)


def mac_of(secret: bytes, data: bytes | memoryview) -> bytes:
    """Return the 16 bytes that prove that *data* was written by who has *secret* (BLAKE2b)."""
    return hashlib.blake2b(data, digest_size=MAC_BYTES, key=secret, person=b"twfs mac 1").digest()


def salt_of(secret: bytes, tenant: int) -> bytes:
    """Return the 32 bytes that keep *tenant*'s names apart; tenant 0, for all, has none."""
    if tenant == 0:
        return b""
    number = tenant.to_bytes(8, "little")
    return hashlib.blake2b(
        number, digest_size=SALT_BYTES, key=secret, person=b"twfs tenant 1"
    ).digest()


def keep_secret(directory: Path, secret: bytes) -> None:
    """Write the file, durable, for its owner alone; nothing is done if it has the secret already.

    NotAllowed if it cannot be written.
    """
    path = directory / SECRET_FILE
    with suppress(OSError):
        if path.read_bytes() == secret:
            return
    fresh = path.with_suffix(".new")
    try:
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.write(descriptor, secret)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        fresh.replace(path)
        home = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(home)
        finally:
            os.close(home)
    except OSError as error:
        raise NotAllowed(f"{path} cannot be written: {error.strerror}") from error


def read_secret(directory: Path) -> bytes:
    """Return what the file holds; InvalidInput if there is none, or it is of another length."""
    path = directory / SECRET_FILE
    try:
        secret = path.read_bytes()
    except OSError as error:
        raise InvalidInput(
            f"{path} cannot be read ({error.strerror}): put the copy of the secret there that "
            "`twfs create` told you to keep"
        ) from error
    if len(secret) != SECRET_BYTES:
        raise InvalidInput(f"{path} has {len(secret)} bytes, and a secret has {SECRET_BYTES}")
    return secret
