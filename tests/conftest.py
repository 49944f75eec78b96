"""What every test shares. Async tests run on asyncio, the loop we ship with."""

from __future__ import annotations

import pytest

from comfyfleet.testing.clock import FakeClock


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()
