from __future__ import annotations

import os
from pathlib import Path

import pytest

from shardserve.errors import ShardError
from shardserve.shards import files


def test_reads_what_is_there_and_follows_links(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert files.read(tmp_path / "file", 7) == files.read(tmp_path / "link", 7) == b"content"


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "zeros").symlink_to("/dev/zero")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    (tmp_path / "round").symlink_to(tmp_path / "round")
    for name, reason in (
        ("pipe", "is not a regular file"),
        ("folder", "Is a directory"),
        ("zeros", "is not a regular file"),
        ("nowhere", "No such file or directory"),
        ("round", "Too many levels of symbolic links"),
        ("missing", "No such file or directory"),
    ):
        with pytest.raises(ShardError) as raised:
            files.read(tmp_path / name, 10)
        assert str(raised.value) == f"{tmp_path / name}: {reason}"


def test_a_file_that_is_too_large_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1 << 40)  # takes no disk
    with pytest.raises(ShardError, match="is larger than 1 MiB"):
        files.read(tmp_path / "large", 1 << 20)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff", "not JSON"),
        (b"\x80\x04}.", "not JSON"),
        (b"NaN", "not JSON"),
        (b"9" * 5000, "not JSON"),
        (b"[" * 200_000 + b"]" * 200_000, "nested too deeply"),
        (b'{"a":' * 200_000, "nested too deeply"),
    ],
)
def test_what_is_no_json_is_refused(content: bytes, reason: str) -> None:
    with pytest.raises(ShardError, match=f"^file: .*{reason}"):
        files.decode_json(content, "file")
