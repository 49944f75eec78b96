"""The version, where every role can read it without touching the package's front door."""

from __future__ import annotations

__version__ = "0.1.0"
