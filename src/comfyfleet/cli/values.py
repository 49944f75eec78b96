"""What several commands take and show: kinds of argument, and a line that is drawn again.

A wrong argument is refused by click, naming the option.
"""

from __future__ import annotations

import re
import shutil

import click

PORT = click.IntRange(0, 65535)


def known_device(_context: click.Context, _parameter: click.Parameter, value: str) -> str:
    """Callback of an option: where to compute, by torch's name."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", value):
        raise click.BadParameter(f"{value!r} is neither cpu nor cuda:N")
    return value


def show_again(text: str, *, err: bool = False) -> None:
    """Draw one line of a terminal anew. It never fills the last column: a line that wraps cannot be drawn over."""
    width = shutil.get_terminal_size().columns - 1
    click.echo(f"\r{text[:width]:<{width}}", nl=False, err=err)
