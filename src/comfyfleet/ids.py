"""New ids, secrets and dice. The only module that draws randomness, so a test can hand in its own.

An id is text that is safe in a URL, a file name and a log line. Secrets have at least 256 bits.
"""

from __future__ import annotations

import random
import secrets
import uuid
from typing import Protocol


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


def _uuid7(now: float, noise: int) -> str:
    """RFC 9562, section 5.7: 48 bits of milliseconds, version, 12 random bits, variant, 62 random bits."""
    high, low = noise >> 62, noise & 0x3FFF_FFFF_FFFF_FFFF
    text = f"{int(now * 1000) & 0xFFFF_FFFF_FFFF:012x}7{high:03x}{low | 0x8000_0000_0000_0000:016x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


class SystemIds:
    """Ids from the operating system's generator."""

    def request_id(self) -> str:
        return str(uuid.uuid4())

    def ordered_id(self, now: float) -> str:
        return _uuid7(now, secrets.randbits(74))

    def token(self, prefix: str = "") -> str:
        return prefix + secrets.token_urlsafe(32)

    def random_int(self) -> int:
        return secrets.randbelow(2**32)

    def uniform(self, low: float, high: float) -> float:
        return random.uniform(low, high)  # noqa: S311 - jitter, not a secret


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
