"""`twfs tenant` and the `--tenant` of other commands: what is made, shown and refused."""

import json
from pathlib import Path

import pytest

from support.cli import assert_refused, document, made_warehouse, twfs
from support.warehouses import MHA, chain_of, payloads_of, tokens_of
from twfs.errors import InvalidInput, NoSuchTenant, NotEmpty
from twfs.warehouse import Warehouse


@pytest.fixture
def warehouse(tmp_path: Path) -> Path:
    """A warehouse with a tenant and one session of theirs, and one of everybody."""
    made = made_warehouse(tmp_path / "tw")
    assert twfs("tenant", "add", made, "acme", "--owner", "root", "--uid", "0,7").returncode == 0
    with Warehouse.open(made) as opened:
        for tenant, blocks in (("acme", 3), (None, 2)):
            model = opened.open_model("m", MHA, tenant=tenant)
            names = chain_of(model, blocks)
            assert opened.put(model, names, payloads_of(MHA, names)).held == blocks
    return made


def test_tenants_are_listed_changed_and_removed(warehouse: Path) -> None:
    listed = document("tenant", "list", warehouse)["tenants"]
    assert [(each["name"], each["uids"]) for each in listed] == [
        ("everybody", None), ("acme", [0, 7]),
    ]  # fmt: skip
    changed = document("tenant", "set", warehouse, "acme", "--uid", "9", "--owner", "5")
    kept = {key: changed["changed"][key] for key in ("id", "name", "owner", "uids")}
    assert kept == {"id": 1, "name": "acme", "owner": 5, "uids": [9]}
    assert "root (0)" in twfs("tenant", "set", warehouse, "everybody", "--uid", "root").stdout
    assert document("tenant", "list", warehouse)["tenants"][0]["uids"] == [0]
    assert "anyone" in twfs("tenant", "set", warehouse, "everybody", "--anyone").stdout
    assert_refused(twfs("tenant", "remove", warehouse, "acme"), NotEmpty.exit_code)
    made = document("tenant", "add", warehouse, "empty")["made"]
    assert document("tenant", "remove", warehouse, "empty")["removed"] == made


def test_quotas_weights_and_groups_are_set_shown_and_taken_away(warehouse: Path) -> None:
    changed = document(
        "tenant", "set", warehouse, "acme", "--quota", "100G", "--weight", "3", "--share", "public"
    )["changed"]
    assert (changed["quota_bytes"], changed["weight"], changed["share"]) == (100 << 30, 3, "public")
    listed = {each["name"]: each for each in document("tenant", "list", warehouse)["tenants"]}
    assert listed["acme"]["share"] == "public"
    assert listed["acme"]["held_bytes"] > 0
    assert listed["public"]["group"]
    shown = twfs("tenant", "list", warehouse).stdout
    assert "100.0 GiB" in shown
    assert "a share group" in shown
    assert "its quota is 1.5 GiB" in twfs(
        "tenant", "add", warehouse, "other", "--quota", "1.5G", "--share", "public"
    ).stdout  # fmt: skip
    changed = document("tenant", "set", warehouse, "acme", "--quota", "none", "--share", "none")
    assert (changed["changed"]["quota_bytes"], changed["changed"]["share"]) == (None, None)
    opened = document("tenant", "set", warehouse, "everybody", "--quota", "1G")["changed"]
    assert (opened["uids"], opened["quota_bytes"]) == (None, 1 << 30)


def test_what_is_no_quota_weight_or_group_is_refused_in_one_line(warehouse: Path) -> None:
    for arguments, code in (
        (("--quota", "much"), InvalidInput.exit_code),
        (("--quota", "0"), InvalidInput.exit_code),
        (("--quota", "-1G"), InvalidInput.exit_code),
        (("--quota", "9999999999P"), InvalidInput.exit_code),
        (("--weight", "0"), InvalidInput.exit_code),
        (("--weight", "heavy"), 2),
        (("--share", "everybody"), InvalidInput.exit_code),
        (("--share", "Not A Name"), InvalidInput.exit_code),
    ):
        assert_refused(twfs("tenant", "set", warehouse, "acme", *arguments), code)
        assert_refused(twfs("tenant", "add", warehouse, "new", *arguments), code)
    assert len(document("tenant", "list", warehouse)["tenants"]) == 2


def test_what_is_no_tenant_or_user_is_refused_in_one_line(warehouse: Path) -> None:
    for arguments, code in (
        (("add", warehouse, "Bad Name"), InvalidInput.exit_code),
        (("add", warehouse, "x", "--uid", "no-such-user"), InvalidInput.exit_code),
        (("set", warehouse, "acme"), InvalidInput.exit_code),
        (("set", warehouse, "nobody-knows", "--uid", "1"), NoSuchTenant.exit_code),
        (("remove", warehouse, "nobody-knows"), NoSuchTenant.exit_code),
    ):
        assert_refused(twfs("tenant", *arguments), code)


def test_ls_and_explain_are_for_a_tenant(warehouse: Path, tmp_path: Path) -> None:
    everything = document("ls", warehouse)["models"][0]["sessions"]
    assert {each["tenant"] for each in everything} == {"acme", "everybody"}
    (mine,) = document("ls", warehouse, "--tenant", "acme")["models"][0]["sessions"]
    assert (mine["tenant"], mine["blocks"]) == ("acme", 3)
    prompt = tmp_path / "prompt.json"
    prompt.write_text(json.dumps(tokens_of(3)))
    for tenant, hits in ((("--tenant", "acme"), 3), ((), 2)):
        found = document("explain", warehouse, "m", "--tokens", prompt, *tenant)
        assert found["explanation"]["hit_blocks"] == hits
    by_hash = document("explain", warehouse, "m", "--hash", mine["head"])
    assert (by_hash["tenant"], by_hash["explanation"]["hit_blocks"]) == (1, 3)
    assert_refused(
        twfs("explain", warehouse, "m", "--tokens", prompt, "--tenant", "x"),
        NoSuchTenant.exit_code,
    )
