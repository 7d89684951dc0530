"""What a request says of itself through an engine's own door: whose it is, and of its session.

A value that is none is left out, counted and logged once: a client's typing error is no reason to
fail its request.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from twfs.errors import InvalidInput
from twfs.hints import NO_HINT, Hint, Retention, Stop

PARAMETERS: Final = "twfs"  # the name under which an engine's open parameters carry ours
KNOWN: Final = frozenset({"tenant", "session", "class", "stop", "return_ms", "public_tokens"})


@dataclass(frozen=True, slots=True)
class Params:
    """A request's tenant (None: everybody), the hint of its session, and its public beginning.

    Of the first *public_tokens* (a system prompt, tools: nobody's secret) whole blocks are the
    tenant's share group's.
    """

    tenant: str | None = None
    hint: Hint = NO_HINT
    public_tokens: int = 0


NO_PARAMS: Final = Params()


def params_of(given: Mapping[str, Any] | None) -> tuple[Params, list[str]]:
    """Return what *given* (an engine's parameters) has under `twfs`, and what was wrong with it."""
    raw = (given or {}).get(PARAMETERS)
    if raw is None:
        return NO_PARAMS, []
    if not isinstance(raw, Mapping):
        return NO_PARAMS, [f"{PARAMETERS} is a {type(raw).__name__}, not a mapping"]
    wrong = [f"{PARAMETERS}.{name} is unknown" for name in raw if name not in KNOWN]
    values: dict[str, Any] = {}
    for name, make in (
        ("tenant", _text), ("session", _text), ("class", Retention), ("stop", Stop),
        ("return_ms", _count), ("public_tokens", _count),
    ):  # fmt: skip
        if raw.get(name) is not None:
            try:
                values[name] = make(raw[name])
            except (ValueError, TypeError) as error:
                wrong.append(f"{PARAMETERS}.{name}: {error}")
    try:
        hint = Hint(
            session=values.get("session", ""), retention=values.get("class"),
            stop=values.get("stop"), return_ms=values.get("return_ms"),
        )  # fmt: skip
    except InvalidInput as error:
        hint = NO_HINT
        wrong.append(str(error))
    return Params(values.get("tenant"), hint, values.get("public_tokens", 0)), wrong


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.40} is no text")
    return value


def _count(value: object) -> int:
    if type(value) is not int or value < 0:
        raise TypeError(f"{value!r:.40} is no whole number from 0 on")
    return value
