"""twfs: the KV cache of LLM inference nodes on NVMe, as a mountable, checked, shared warehouse.

The public names; everything else may change without notice.
"""

from twfs.client import Client, connect
from twfs.datapath.match import Match
from twfs.devices.formatting import DeviceSpec
from twfs.errors import TwfsError
from twfs.hints import Hint, Retention, Stop
from twfs.layout import Arrangement, Group, GroupKind, Layout
from twfs.prefix import OwnKey, names_of_keys
from twfs.store import Model, PutResult, ReadReport, Store
from twfs.warehouse import Warehouse

__all__ = [
    "Arrangement",
    "Client",
    "DeviceSpec",
    "Group",
    "GroupKind",
    "Hint",
    "Layout",
    "Match",
    "Model",
    "OwnKey",
    "PutResult",
    "ReadReport",
    "Retention",
    "Stop",
    "Store",
    "TwfsError",
    "Warehouse",
    "connect",
    "names_of_keys",
]
