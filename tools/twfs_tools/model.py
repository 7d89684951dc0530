"""`twfs model`: the models of a warehouse and their layouts."""

import json
from pathlib import Path
from typing import Annotated

import typer

from twfs.errors import InvalidInput
from twfs.layout import Layout, check_own_name
from twfs.store import ModelInfo
from twfs_tools.output import JsonFlag, age, print_json, print_table, say, size
from twfs_tools.target import SocketOption, WarehouseArgument, model_named, opened

LAYOUT_BYTES_MAX = 1 << 20  # far more than 64 groups need; keeps a wrong file out of memory

NameArgument = Annotated[str, typer.Argument(help="The model, as `twfs model list` shows it.")]

app = typer.Typer(help="List models, make them, show their layout, open a new epoch.")


@app.command("list")
def list_models(
    warehouse: WarehouseArgument, socket: SocketOption = None, *, as_json: JsonFlag = False
) -> None:
    """List all models."""
    with opened(warehouse, socket) as store:
        models = store.models()
    if as_json:
        print_json({"models": models})
        return
    print_table(
        ("MODEL", ">EPOCH", ">BLOCKS", ">HEADS", ">ON DEVICE", ">BLOCK", "CREATED"),
        [
            (
                info.name, info.epoch, f"{info.blocks:,}", f"{info.heads:,}",
                size(info.device_bytes), size(info.layout.block_bytes(info.layout.spine)),
                age(info.created_ms),
            )
            for info in models
        ],
    )  # fmt: skip


@app.command("create")
def create_model(
    warehouse: WarehouseArgument,
    name: NameArgument,
    layout: Annotated[Path, typer.Option("--layout", help="The layout, a JSON file.")],
    socket: SocketOption = None,
    *,
    as_json: JsonFlag = False,
) -> None:
    """Make a model with a layout; the same layout again changes nothing."""
    check_own_name(name)
    wanted = read_layout(layout)
    with opened(warehouse, socket) as store:
        was_there = any(info.name == name for info in store.models())
        store.open_model(name, wanted)
        info = model_named(store, name)
    if as_json:
        print_json({"made": not was_there, "model": info})
    else:
        say(f"model {name} {'was there already' if was_there else 'made'}: {_summary(info)}")


@app.command("epoch")
def new_epoch(
    warehouse: WarehouseArgument,
    name: NameArgument,
    socket: SocketOption = None,
    *,
    as_json: JsonFlag = False,
) -> None:
    """Open a new epoch: every block stored so far is no longer found (weights were updated)."""
    with opened(warehouse, socket) as store:
        before = model_named(store, name)
        model = store.new_epoch(store.open_model(name))
    if as_json:
        print_json({"model": name, "epoch": model.epoch, "blocks_unreachable": before.blocks})
    else:
        say(f"model {name} is at epoch {model.epoch}; {before.blocks:,} older blocks are not found")


@app.command("show")
def show(
    warehouse: WarehouseArgument,
    name: NameArgument,
    socket: SocketOption = None,
    *,
    as_json: JsonFlag = False,
) -> None:
    """Show a model and its layout (the JSON is what `create --layout` takes)."""
    with opened(warehouse, socket) as store:
        info = model_named(store, name)
    if as_json:
        print_json({"model": info, "fingerprint": info.layout.fingerprint})
        return
    say(f"{info.name}: {_summary(info)}")
    say(f"layout fingerprint {info.layout.fingerprint.hex()}")
    print_json(info.layout)


def read_layout(path: Path) -> Layout:
    """Return the layout in the JSON file *path*; InvalidInput if it holds none."""
    with path.open("rb") as file:
        data = file.read(LAYOUT_BYTES_MAX + 1)
    if len(data) > LAYOUT_BYTES_MAX:
        raise InvalidInput(f"{path} is larger than {LAYOUT_BYTES_MAX} bytes: that is no layout")
    try:
        document = json.loads(data)
    except ValueError as error:
        raise InvalidInput(f"{path} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise InvalidInput(f"{path} holds no layout: a JSON object is wanted")
    return Layout.from_dict(document)


def _summary(info: ModelInfo) -> str:
    """Say in one line what a model is."""
    layout = info.layout
    groups = ", ".join(
        f"{group.layers} layers {group.kind.value} {group.dtype}" for group in layout.groups
    )
    return (
        f"{layout.model} for {layout.engine}, blocks of {layout.block_tokens} tokens and "
        f"{size(layout.block_bytes(layout.spine))}, {layout.shards} shards; {groups}; "
        f"epoch {info.epoch}, {info.blocks:,} blocks"
    )
