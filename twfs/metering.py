"""What tenants hold and are served, as figures: for status, metrics and bills."""

from typing import Any

from twfs.core import Core


def figures(core: Core) -> dict[str, Any]:
    """What each tenant is charged now, by name; JSON-ready. Hold the lock."""
    charges, tenants = core.charges, core.tenants
    numbers = {each.id for each in tenants} | set(charges.holders())
    return {
        "charged": {
            tenants.name_of(number): {
                "held_bytes": charges.held[number],
                "reserved_bytes": charges.reserved[number],
                "quota_bytes": tenants.quota_of(number) or 0,
                "weight": tenants.weight_of(number),
            }
            for number in sorted(numbers)
        }
    }
