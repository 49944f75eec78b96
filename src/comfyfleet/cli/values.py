"""Kinds of argument that several commands take. A wrong one is refused by click, naming the option."""

from __future__ import annotations

import click

PORT = click.IntRange(0, 65535)
