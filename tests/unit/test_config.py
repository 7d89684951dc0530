"""The settings file: what is unknown or malformed is refused in a sentence, never half believed."""

from pathlib import Path

import pytest

from twfs.config import CONFIG_BYTES_MAX, CONFIG_FILE, Config, duration_ms, load, parse, settings_of
from twfs.errors import InvalidInput


@pytest.mark.parametrize(
    ("text", "millis"),
    [("90s", 90_000), ("15m", 900_000), ("1h", 3_600_000), ("30d", 2_592_000_000),
     ("2w", 1_209_600_000), ("never", None)],
)  # fmt: skip
def test_durations(text: str, millis: int | None) -> None:
    assert duration_ms(text) == millis


@pytest.mark.parametrize("text", ["", "1", "1 h", "1.5h", "-1h", "h", "1y", "9999999999s"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(InvalidInput, match="no duration"):
        duration_ms(text)


def test_nothing_need_be_said() -> None:
    assert parse(b"") == Config()


def test_a_class_is_set() -> None:
    config = parse(b'[retention.durable]\nttl = "7d"\nshare = 0.25\n')
    assert (config.retention.durable.ttl, config.retention.durable.share) == ("7d", 0.25)
    assert config.retention.ephemeral == Config().retention.ephemeral


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[retention.durable]\nttll = '7d'", "ttll"),
        ("[retention.eternal]\nttl = '7d'", "eternal"),
        ("[retentions]", "retentions"),
        ("[retention.durable]\nttl = 7", "ttl"),
        ("[retention.durable]\nttl = '7 days'", "no duration"),
        ("[retention.durable]\nshare = 1.5", "share"),
        ("[retention.durable]\nshare = 'half'", "share"),
        ("[retention.pinned]\nttl = '7d'", "never go"),
        ("[retention", "twfs.toml"),
        ("\x00", "twfs.toml"),
    ],
)
def test_what_is_wrong_is_said(text: str, says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        parse(text.encode())


@pytest.mark.parametrize("data", [b"\xff\xfe", b"x" * (CONFIG_BYTES_MAX + 1)], ids=["utf8", "long"])
def test_what_is_no_text_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidInput, match=r"twfs\.toml"):
        parse(data)


def test_the_file_lies_in_the_warehouse(tmp_path: Path) -> None:
    assert settings_of(tmp_path) == Config()
    path = tmp_path / CONFIG_FILE
    path.write_text("[retention.standard]\nttl = '1d'\n")
    assert settings_of(tmp_path).retention.standard.ttl == "1d"
    path.write_text("[retention.standard]\nttl = 'soon'\n")
    with pytest.raises(InvalidInput, match=str(path)):
        settings_of(tmp_path)


def test_a_file_that_was_named_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="cannot be read"):
        load(tmp_path / "absent.toml")
