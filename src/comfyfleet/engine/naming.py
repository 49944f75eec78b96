"""How ComfyUI names what it saves: `<prefix>_<counter>_.<ext>`, tokens in the prefix, one counter for all extensions.

Pure, but for the listing it is given. Its habits are kept, since scripts know them: a prefix that holds `%batch_num%`
never matches an existing file, so such runs start at 00001 again and overwrite.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from datetime import datetime


class OutsideFolder(ValueError):
    """The prefix leads out of the output folder."""


def fill_tokens(prefix: str, *, width: int, height: int, now: datetime) -> str:
    """Replace %width%, %height% and the parts of the local time; %batch_num% stays for `batch_name`."""
    if "%" not in prefix:
        return prefix
    values = {
        "width": str(width),
        "height": str(height),
        "year": str(now.year),
        "month": f"{now.month:02}",
        "day": f"{now.day:02}",
        "hour": f"{now.hour:02}",
        "minute": f"{now.minute:02}",
        "second": f"{now.second:02}",
    }
    for name, value in values.items():
        prefix = prefix.replace(f"%{name}%", value)
    return prefix


def split_prefix(prefix: str) -> tuple[str, str, int]:
    """(sub-folder, name, length of the part that must match in a listing). Raises OutsideFolder."""
    clean = os.path.normpath(prefix)
    subfolder, name = os.path.split(clean)
    if os.path.isabs(clean) or clean == ".." or clean.startswith(".." + os.sep):
        raise OutsideFolder(f"saving outside the output folder is not allowed: {prefix}")
    return subfolder.replace(os.sep, "/"), name, len(os.path.basename(prefix))


def next_counter(listing: Iterable[str], name: str, matched_length: int) -> int:
    """One more than the highest number among the files that have this name.

    ComfyUI compares the first `matched_length` characters of each file with the name, so a prefix that ends in a slash
    or holds a token matches nothing, and counts from 1.
    """
    if matched_length != len(name):
        return 1
    # One search through all names: folders of many thousand files are listed at each save.
    numbers = re.findall(rf"^{re.escape(name)}_([0-9]+)(?:_|$)", "\n".join(listing), re.MULTILINE)
    return 1 + max(map(int, numbers), default=0)


def file_name(name: str, counter: int, extension: str, batch_number: int) -> str:
    return f"{name.replace('%batch_num%', str(batch_number))}_{counter:05}_.{extension}"
