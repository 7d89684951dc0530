"""`twfs create`: format devices or make an image, and begin an empty warehouse on them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from twfs.errors import InvalidInput
from twfs_tools.output import JsonFlag, parse_size, print_json, say, size, working

if TYPE_CHECKING:
    from twfs.devices.device import DeviceSpec


def create(
    directory: Annotated[Path, typer.Argument(help="Where the metadata will be.")],
    image: Annotated[
        str | None, typer.Option("--size", help="Make DIRECTORY/device0.img of this size.")
    ] = None,
    devices: Annotated[
        list[str] | None,
        typer.Option(
            "--device", help="Block devices, or images as PATH:SIZE; repeatable, or with commas."
        ),
    ] = None,
    *,
    group: Annotated[
        str | None,
        typer.Option("--group", help="Whose members may use it as engines do, beside the owner."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Overwrite what the devices hold now.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Make an empty warehouse in DIRECTORY, on an image of --size or on each --device."""
    from twfs.secret import SECRET_FILE  # noqa: PLC0415
    from twfs.warehouse import Warehouse  # noqa: PLC0415

    specs = device_specs(directory, image, devices or [])
    with working(f"creating {directory}"):
        Warehouse.create(directory, specs, force=force, group=group)
    with working("opening it"):
        warehouse = Warehouse.open(directory)
        try:
            uuid, space = warehouse.uuid, warehouse.space()
        finally:
            warehouse.close()
    paths = [str(spec.path) for spec in specs]
    if as_json:
        print_json({
            "directory": directory, "uuid": uuid, "devices": paths,
            "total_bytes": space.total_bytes, "free_bytes": space.free_bytes,
            "secret": directory / SECRET_FILE,
        })  # fmt: skip
    else:
        say(f"warehouse {uuid} in {directory}: {size(space.total_bytes)} on {', '.join(paths)}")
        say(
            f"keep a copy of {directory / SECRET_FILE} in a safe place: without it the blocks "
            "cannot be found again should the metadata be lost"
        )


def device_specs(directory: Path, image: str | None, devices: list[str]) -> "list[DeviceSpec]":
    """Return what --size and --device mean; InvalidInput if neither or both were given."""
    from twfs.devices.device import DeviceSpec  # noqa: PLC0415

    if (image is None) == (not devices):
        raise InvalidInput("give either --size for an image, or --device for each device")
    if image is not None:
        return [DeviceSpec(directory.absolute() / "device0.img", parse_size(image))]
    specs = []
    for text in (part for given in devices for part in given.split(",") if part):
        path, colon, wanted = text.rpartition(":")
        if colon and not Path(text).exists():
            specs.append(DeviceSpec(Path(path).absolute(), parse_size(wanted)))
        else:
            specs.append(DeviceSpec(Path(text).absolute(), None))
    if not specs:
        raise InvalidInput("--device names no device")
    return specs
