"""Digests of files for several users: taken once, until the last of them has done with it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from llamatune.formats.background_digests import SharedDigests


def test_digests_of_the_same_files_are_shared_until_the_last_user_abandons_them(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(b"1" * 100)
    other.write_bytes(b"2" * 100)
    digest = SharedDigests()
    first, second, third = digest({"one": one}), digest({"one": one}), digest({"one": one, "other": other})
    assert first is second
    assert third is not first
    first.start()
    second.start()
    first.abandon()
    assert second.wait(None)
    assert second.found == {"one": (100, hashlib.sha256(b"1" * 100).hexdigest())}
    second.abandon()
    one.write_bytes(b"3")
    later = digest({"one": one})
    assert later is not first
    assert later.wait(None)
    assert later.found == {"one": (1, hashlib.sha256(b"3").hexdigest())}
    for left in (third, later):
        left.abandon()
