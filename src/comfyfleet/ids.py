"""New ids, secrets and dice. The only module that draws randomness, so a test can hand in its own.

An id is text that is safe in a URL, a file name and a log line. Secrets have at least 256 bits.
"""

from __future__ import annotations

import os
import random
import secrets
import uuid
from typing import ClassVar, Protocol


class Ids(Protocol):
    """Where new names come from."""

    def request_id(self) -> str:
        """A UUID4, the form the documents show."""
        ...

    def ordered_id(self, now: float) -> str:
        """A UUID7: ids of one time are neighbours in a database's index. now: epoch seconds."""
        ...

    def token(self, prefix: str = "") -> str:
        """`prefix` and 256 random bits, URL-safe."""
        ...

    def random_int(self) -> int:
        """0 to 2**32 - 1: what `__RANDOM_INT__` becomes."""
        ...

    def uniform(self, low: float, high: float) -> float:
        """For jitter; not for secrets."""
        ...


_62_BITS, _74_BITS, _VARIANT = (1 << 62) - 1, (1 << 74) - 1, 1 << 63
_DRAWN_AT_ONCE = 256


def _uuid7(now: float, noise: int) -> str:
    """RFC 9562, section 5.7: 48 bits of milliseconds, and the rest as in version 4. noise: 74 bits."""
    return _uuid(int(now * 1000) & 0xFFFF_FFFF_FFFF, 7, noise)


def _uuid4(noise: int) -> str:
    """RFC 9562, section 5.4: all of it random. noise: 122 bits."""
    return _uuid(noise >> 74, 4, noise & _74_BITS)


def _uuid(first: int, version: int, noise: int) -> str:
    """48 bits, version, 12 bits, variant, 62 bits."""
    text = f"{first:012x}{version}{noise >> 62:03x}{noise & _62_BITS | _VARIANT:016x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


class SystemIds:
    """Ids from the operating system's generator.

    Noise for ids, which are no secrets, is drawn for many at once: each draw gives the interpreter away (14 us where
    another thread waits for it). For any thread; a forked child draws its own.
    """

    _noise: ClassVar[list[bytes]] = []
    os.register_at_fork(after_in_child=_noise.clear)

    def request_id(self) -> str:
        return _uuid4(self._bits(122))

    def ordered_id(self, now: float) -> str:
        return _uuid7(now, self._bits(74))

    def token(self, prefix: str = "") -> str:
        return prefix + secrets.token_urlsafe(32)

    def random_int(self) -> int:
        return secrets.randbelow(2**32)

    def uniform(self, low: float, high: float) -> float:
        return random.uniform(low, high)  # noqa: S311 - jitter, not a secret

    def _bits(self, count: int) -> int:
        """At most 128."""
        while True:
            try:
                return int.from_bytes(self._noise.pop(), "big") >> (128 - count)
            except IndexError:
                drawn = os.urandom(16 * _DRAWN_AT_ONCE)
                self._noise.extend(drawn[at : at + 16] for at in range(0, len(drawn), 16))


class SeededIds:
    """The same ids in the same order for the same seed: for tests, simulations and replays."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)  # noqa: S311 - repeatable on purpose

    def request_id(self) -> str:
        return str(uuid.UUID(int=self._random.getrandbits(128), version=4))

    def ordered_id(self, now: float) -> str:
        return _uuid7(now, self._random.getrandbits(74))

    def token(self, prefix: str = "") -> str:
        return f"{prefix}{self._random.getrandbits(256):064x}"

    def random_int(self) -> int:
        return self._random.getrandbits(32)

    def uniform(self, low: float, high: float) -> float:
        return self._random.uniform(low, high)
