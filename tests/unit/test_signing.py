"""A signed link opens one file until its expiry, and nothing else."""

from __future__ import annotations

from urllib.parse import parse_qs

from hypothesis import given
from hypothesis import strategies as st

from comfyfleet.signing import UrlSigner
from comfyfleet.testing.clock import FakeClock


def a_link(clock: FakeClock, path: str) -> tuple[UrlSigner, str, str]:
    signer = UrlSigner(b"k" * 32, clock)
    query = parse_qs(signer.query(path, expires_in_s=60))
    return signer, query["expires"][0], query["signature"][0]


def test_a_link_works_until_it_expires(clock: FakeClock) -> None:
    signer, expires, signature = a_link(clock, "/files/a/b.mp3")

    assert signer.is_valid("/files/a/b.mp3", expires, signature)
    clock.jump(61)
    assert not signer.is_valid("/files/a/b.mp3", expires, signature)


@given(path=st.text(max_size=30), expires=st.text(max_size=14), signature=st.text(max_size=70))
def test_nothing_but_the_signed_path_and_expiry_is_accepted(path: str, expires: str, signature: str) -> None:
    signer, good_expires, good_signature = a_link(FakeClock(), "/files/a")

    if (path, expires) != ("/files/a", good_expires):
        assert not signer.is_valid(path, expires, good_signature)
    if signature != good_signature:
        assert not signer.is_valid("/files/a", good_expires, signature)
