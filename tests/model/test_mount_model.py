"""The mount against the library: what `ls`, stat, xattrs and reads show is what the store lists.

Sessions are stored through the socket; then removed by rm, taken out and brought back by cp, given
other classes by setfattr, evicted, while everything is compared name by name and byte by byte.
"""

import os
import shutil
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from support.modelling import MODEL_LAYOUTS, examples, fresh_payload, names_along, paths, which
from support.mounting import Mount, mounted, names_in, shell, until
from twfs.client import Client
from twfs.records import BlockKey
from twfs.store import BlockInfo, Model, PutOutcome, Retention
from twfs.units import ByteCount, PrefixHash
from twfs.vfs.chainfile import block_name

numbers = st.integers(0, 20)


class MountMachine(RuleBasedStateMachine):
    """Drives the mount and a client beside it, and remembers what was published."""

    mount: ClassVar[Mount]
    scratch: ClassVar[Path]
    examples: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        type(self).examples += 1
        self.client: Client = self.mount.client()
        self.models: dict[str, Model] = {}
        self.published: dict[BlockKey, bytes] = {}
        self.away: dict[tuple[str, str], Path] = {}  # sessions that were copied out
        self.written = 0

    @initialize()
    def open_models(self) -> None:
        for name, layout in MODEL_LAYOUTS.items():
            self.models[name] = self.client.open_model(f"{name}-{self.examples}", layout)
            until(self.folder(name).is_dir, "the new model is listed")

    def folder(self, name: str) -> Path:
        return self.mount.path / self.models[name].name

    def heads(self, name: str) -> list[PrefixHash]:
        return self.client.heads(self.models[name].id)

    def chosen(self, name: str, number: int) -> PrefixHash | None:
        heads = self.heads(name)
        return heads[number % len(heads)] if heads else None

    @rule(name=which, path=paths)
    def put(self, name: str, path: list[int]) -> None:
        model = self.models[name]
        names = names_along(model, path)
        for shard in range(model.layout.shards):
            payloads = []
            for _ in path:
                self.written += 1
                payloads.append(fresh_payload(model.layout, self.written))
            result = self.client.put(model, names, payloads, shard=shard)
            for index, outcome in enumerate(result.outcomes):
                if outcome is PutOutcome.PUBLISHED:
                    key = BlockKey(model.id, names.hash_at(index), 0, shard)
                    self.published[key] = payloads[index]

    @rule(name=which, number=numbers)
    def rm(self, name: str, number: int) -> None:
        head = self.chosen(name, number)
        if head is not None:
            shell("rm", "-r", self.folder(name) / head.hex())
            assert head not in self.heads(name)

    @rule(name=which, number=numbers)
    def cp_out(self, name: str, number: int) -> None:
        head = self.chosen(name, number)
        if head is not None:
            to = self.scratch / f"out-{self.models[name].name}"
            to.mkdir(exist_ok=True)
            shutil.rmtree(to / head.hex(), ignore_errors=True)
            shell("cp", "-r", self.folder(name) / head.hex(), to)
            self.away[name, head.hex()] = to / head.hex()

    @precondition(lambda self: self.away)
    @rule(number=numbers)
    def cp_back(self, number: int) -> None:
        """An import: blocks that are there already stay what they are."""
        name, head = sorted(self.away)[number % len(self.away)]
        if (self.folder(name) / head).exists():
            return
        copy = self.away[name, head]
        shell("cp", "-r", copy, self.folder(name))
        for info in self.client.chain_of(self.models[name].id, PrefixHash(bytes.fromhex(head))):
            file = copy / block_name(self.models[name].layout, info.index, 0, info.key.shard)
            if not self.there_before(info):
                self.published[info.key] = file.read_bytes()

    def there_before(self, info: BlockInfo) -> bool:
        return (
            info.key in self.published
            and bytes(self.client.read_block(info)) == (self.published[info.key])
        )

    @rule(name=which, number=numbers, retention=st.sampled_from(Retention))
    def setfattr(self, name: str, number: int, retention: Retention) -> None:
        head = self.chosen(name, number)
        if head is not None:
            path = self.folder(name) / head.hex()
            os.setxattr(path, "user.twfs.class", retention.value.encode())
            assert os.getxattr(path, "user.twfs.class") == retention.value.encode()

    @rule(blocks=st.integers(1, 8))
    def evict(self, blocks: int) -> None:
        self.client.evict(ByteCount(8192 * blocks))

    @invariant()
    def the_mount_shows_what_the_library_lists(self) -> None:
        for name, model in self.models.items():
            heads = self.heads(name)
            wanted = ["detached", *(head.hex() for head in heads)]
            assert names_in(self.folder(name)) == sorted(wanted)
            for head in heads:
                self.compare(name, model, head)

    def compare(self, name: str, model: Model, head: PrefixHash) -> None:
        folder = self.folder(name) / head.hex()
        infos = self.client.chain_of(model.id, head)
        files = {
            block_name(model.layout, info.index, info.key.group, info.key.shard): info
            for info in infos
        }
        assert names_in(folder) == sorted([*files, "chain.json"])
        for file, info in files.items():
            seen = (folder / file).stat()
            assert (seen.st_ino, seen.st_size) == (info.block.ino, info.block.payload_bytes)
            assert seen.st_blocks * 512 == info.block.device_bytes
            assert (seen.st_nlink > 1) == (info.links > 1)
            assert (folder / file).read_bytes() == self.published[info.key]
            digest = os.getxattr(folder / file, "user.twfs.digest").decode()
            assert digest == info.block.digest.hex()

    def teardown(self) -> None:
        try:
            assert self.client.check(data=True).findings == ()
            for name in self.models:
                for head in self.heads(name):
                    shell("rm", "-r", self.folder(name) / head.hex())
                assert names_in(self.folder(name)) == ["detached"]
            for copy in self.away.values():
                shutil.rmtree(copy, ignore_errors=True)
            assert self.mount.statistics()["mount"]["failed_requests"] == 0
        finally:
            self.client.close()


@pytest.mark.fuse
@pytest.mark.slow
def test_the_mount_agrees_with_the_library(scratch: Path, tmp_path: Path) -> None:
    with mounted(scratch / "w", tmp_path / "mount") as mount:
        MountMachine.mount, MountMachine.scratch = mount, scratch
        run_state_machine_as_test(
            MountMachine, settings=settings(max_examples=examples(10), stateful_step_count=12)
        )
