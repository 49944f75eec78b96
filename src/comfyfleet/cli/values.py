"""What several commands take and show: kinds of argument, and a line that is drawn again.

A wrong argument is refused by click, naming the option.
"""

from __future__ import annotations

import math
import re
import shutil
from typing import Any

import click

PORT = click.IntRange(0, 65535)


class NumberRange(click.FloatRange):
    """From min to max, both allowed. click's own range lets NaN through, which is neither below nor above."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value} is no number", param, ctx)
        return number


def known_device(_context: click.Context, _parameter: click.Parameter, value: str) -> str:
    """Callback of an option: where to compute, by torch's name."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", value):
        raise click.BadParameter(f"{value!r} is neither cpu nor cuda:N")
    return value


def show_again(text: str, *, err: bool = False) -> None:
    """Draw one line of a terminal anew. It never fills the last column: a line that wraps cannot be drawn over."""
    width = shutil.get_terminal_size().columns - 1
    click.echo(f"\r{text[:width]:<{width}}", nl=False, err=err)
