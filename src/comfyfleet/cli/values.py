"""What several commands take and show: kinds of argument, and a line that is drawn again.

A wrong argument is refused by click, naming the option.
"""

from __future__ import annotations

import math
import re
import shutil
from typing import Any

import click

_IDENTIFIER = re.compile(r"[0-9A-Za-z_-]{1,128}")


class NumberRange(click.FloatRange):
    """A finite float in a range. click's own lets NaN through, and JSON says of it, as of inf, that none was given."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is no finite number", param, ctx)
        return number


class Identifier(click.types.StringParamType):
    """What may stand in an address as the id or the name of one thing; `..` and `/` would lead to another."""

    name = "id"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not _IDENTIFIER.fullmatch(value):
            self.fail(f"{value!r} has other characters than letters, digits, - and _, or none", param, ctx)
        return str(value)


PORT = click.IntRange(0, 65535)
COUNT = click.IntRange(0)
FINITE = NumberRange()
AMOUNT = NumberRange(min=0)
OVER_ZERO = NumberRange(min=0, min_open=True)
IDENTIFIER = Identifier()


def known_device(_context: click.Context, _parameter: click.Parameter, value: str) -> str:
    """Callback of an option: where to compute, by torch's name."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", value):
        raise click.BadParameter(f"{value!r} is neither cpu nor cuda:N")
    return value


def show_again(text: str, *, err: bool = False) -> None:
    """Draw one line of a terminal anew. It never fills the last column: a line that wraps cannot be drawn over."""
    width = shutil.get_terminal_size().columns - 1
    click.echo(f"\r{text[:width]:<{width}}", nl=False, err=err)
