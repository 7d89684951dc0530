"""What an operator asks of an open warehouse beside listing: verbs with checked arguments.

Each part of the warehouse that has something to operate (devices, scrubber, tenants ...) brings its
verbs; adding one touches neither the protocol nor the client. Arguments and results are JSON-ready.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from twfs.errors import InvalidInput

ARGUMENTS_BYTES_MAX: Final = 64 << 10


@dataclass(frozen=True, slots=True)
class Verb:
    """One operation: *arguments* is a msgspec.Struct, of which *run* gets an instance.

    *run* may block, must be thread-safe, raises TwfsErrors, and returns what msgspec can encode.
    """

    arguments: type[msgspec.Struct]
    run: Callable[[Any], Any]


Verbs = Mapping[str, Verb]


class NoArguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of verbs that need none."""


def operate(verbs: Verbs, name: str, arguments: bytes) -> bytes:
    """Run the verb *name* with *arguments*, a JSON document of at most 64 KiB; its result as JSON.

    InvalidInput if there is no such verb or the arguments are not its; and what the verb raises.
    """
    verb = verbs.get(name)
    if verb is None:
        raise InvalidInput(f"no operation {name!r}: this daemon knows {', '.join(sorted(verbs))}")
    if len(arguments) > ARGUMENTS_BYTES_MAX:
        raise InvalidInput(f"arguments of {len(arguments)} bytes: at most {ARGUMENTS_BYTES_MAX}")
    try:
        given = msgspec.json.decode(arguments, type=verb.arguments)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise InvalidInput(f"arguments of {name!r}: {error}") from error
    return msgspec.json.encode(verb.run(given))
