"""What every test shares. Async tests run on asyncio, the loop we ship with."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

from comfyfleet.testing.clock import FakeClock

# How long an example takes says how busy the machine is, and nothing about the code.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()
