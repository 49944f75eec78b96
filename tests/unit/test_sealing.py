"""A sealed secret opens with its key and for its purpose only; a key file is made once and read by its owner."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfyfleet.sealing import CannotOpen, Sealer, load_or_create_key


@given(plain=st.binary(max_size=100), at=st.integers(0, 200))
def test_what_was_sealed_opens_and_what_was_changed_does_not(plain: bytes, at: int) -> None:
    sealer = Sealer(b"k" * 32, "webhooks")
    sealed = bytearray(sealer.seal(plain))

    assert sealer.open(bytes(sealed)) == plain
    sealed[at % len(sealed)] ^= 1
    with pytest.raises(CannotOpen):
        sealer.open(bytes(sealed))


def test_another_key_or_another_purpose_does_not_open() -> None:
    sealed = Sealer(b"k" * 32, "webhooks").seal(b"secret")

    for other in (Sealer(b"x" * 32, "webhooks"), Sealer(b"k" * 32, "journal")):
        with pytest.raises(CannotOpen):
            other.open(sealed)
    with pytest.raises(CannotOpen):
        other.open(b"")


def test_a_key_file_is_made_once_for_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "files.key"

    first = load_or_create_key(path)

    assert load_or_create_key(path) == first
    assert len(first) == 32
    assert path.stat().st_mode & 0o777 == 0o600
    assert [one.name for one in path.parent.iterdir()] == ["files.key"]


def test_a_damaged_key_file_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "files.key").write_bytes(b"short")

    with pytest.raises(ValueError, match="no key"):
        load_or_create_key(tmp_path / "files.key")
