"""The tree keeps bounded memory, gives every node its own inode, and never awaits."""

from pathlib import Path

import pytest
import trio.testing

from support.warehouses import MHA, SHARDED, chain_of, open_warehouse, put, put_whole
from twfs.errors import BlockGone, NoSuchBlock, NotEmpty
from twfs.prefix import Names
from twfs.store import Model
from twfs.units import ByteCount
from twfs.vfs import tree as trees
from twfs.vfs.describing import metrics
from twfs.vfs.importing import Importer
from twfs.vfs.nodes import ROOT, BlockFile, Node, SessionDirectory
from twfs.vfs.tree import Tree
from twfs.warehouse import Warehouse


def tree_of(warehouse: Warehouse) -> Tree:
    return Tree(warehouse, Importer(warehouse, warehouse.directory))


def session_of(tree: Tree, model: Model, names: Names) -> SessionDirectory:
    return tree.session(model.id, names.hash_at(len(names) - 1))


def all_nodes(tree: Tree, directory: Node = ROOT) -> list[Node]:
    """Every node below *directory*, once per name."""
    found: list[Node] = []
    for _, row in tree.rows(directory).since(0):
        assert tree.lookup(directory, row.name) == row.node
        assert tree.attributes(row.node).ino == row.node.ino == row.attributes.ino
        found.append(row.node)
        if not hasattr(row.node, "key") and not row.name.endswith((".json", "metrics")):
            found += all_nodes(tree, row.node)
    return found


def test_inode_stands_for_one_node(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        for name, layout in (("one", MHA), ("two", SHARDED)):
            model = warehouse.open_model(name, layout)
            put_whole(warehouse, model, chain_of(model, 4))
            put_whole(warehouse, model, chain_of(model, 5, seed=2, fork=2))
        tree = tree_of(warehouse)
        nodes = all_nodes(tree)
        assert len({node.ino for node in nodes}) == len(set(nodes))
        assert len(nodes) - len(set(nodes)) == 2 + 4, "blocks of two sessions have two names"


def test_numbers_of_rows_keep_their_meaning(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 6)
        put(warehouse, model, names)
        tree = tree_of(warehouse)
        session = session_of(tree, model, names)
        rows = tree.rows(session)
        seen = list(rows.since(0))
        tree.hide(session, "00001.kv")
        again = list(rows.since(2))
        assert [row.name for _, row in again] == [row.name for _, row in seen[3:]]
        assert [number for number, _ in again] == [number for number, _ in seen[3:]]


def test_hidden_names_come_back_with_show(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 1)
        put(warehouse, model, names)
        tree = tree_of(warehouse)
        session = session_of(tree, model, names)
        for name in ("00000.kv", "chain.json"):
            with pytest.raises(NotEmpty):
                tree.check_empty(session)
            tree.hide(session, name)
            with pytest.raises(NoSuchBlock):
                tree.lookup(session, name)
            with pytest.raises(NoSuchBlock):
                tree.hide(session, name)
        tree.check_empty(session)
        tree.show(session)
        assert isinstance(tree.lookup(session, "00000.kv"), BlockFile)
        assert tree.statistics()["hidden_names"] == 0


def test_kept_chains_are_bounded(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trees, "CHAINS_BLOCKS_MAX", 10)
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        tree = tree_of(warehouse)
        for seed in range(6):
            names = chain_of(model, 4, seed=seed + 1)
            put(warehouse, model, names)
            list(tree.rows(session_of(tree, model, names)).since(0))
            assert tree.statistics()["chain_blocks"] <= 10
        long = chain_of(model, 30, seed=50)
        put(warehouse, model, long)
        assert len(list(tree.rows(session_of(tree, model, long)).since(0))) == 31
        assert tree.statistics()["chains"] == 1, "the one in use is kept, however long"


def test_unchanged_chain_is_read_once_and_a_changed_one_again(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 3)
        put(warehouse, model, names)
        tree = tree_of(warehouse)
        session = session_of(tree, model, names)
        for _ in range(3):
            list(tree.rows(session).since(0))
        assert tree.statistics()["chain_reads"] == 1
        put(warehouse, model, chain_of(model, 4, seed=3, fork=2))
        links = [row.attributes.links for _, row in tree.rows(session).since(1)]
        assert links == [2, 2, 1]
        assert tree.statistics()["chain_reads"] == 2


def test_node_of_an_ended_life_is_gone(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        names = chain_of(model, 2)
        put(warehouse, model, names)
        tree = tree_of(warehouse)
        session = session_of(tree, model, names)
        file = tree.lookup(session, "00001.kv")
        assert isinstance(file, BlockFile)
        warehouse.evict(ByteCount(1))
        for node in (session, file):
            with pytest.raises(BlockGone):
                tree.attributes(node)
        put(warehouse, model, names)
        for node in (session, file):
            with pytest.raises(BlockGone):
                tree.attributes(node)
        assert tree.lookup(session_of(tree, model, names), "00001.kv") != file


async def test_looking_never_yields_to_another_task(scratch: Path) -> None:
    with open_warehouse(scratch) as warehouse:
        model = warehouse.open_model("m", MHA)
        put(warehouse, model, chain_of(model, 3))
        with trio.testing.assert_no_checkpoints():
            assert len(all_nodes(tree_of(warehouse))) > 8


def test_metrics_are_lines_of_name_and_number() -> None:
    figures = {"a": {"b-c": 1, "d": True, "e": "text"}, "f": [0.5, {"g": 2}], "h": None}
    assert metrics(figures).decode().splitlines() == [
        "twfs_a_b_c 1", "twfs_a_d 1", "twfs_f_0 0.5", "twfs_f_1_g 2",
    ]  # fmt: skip
