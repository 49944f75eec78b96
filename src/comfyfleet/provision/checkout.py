"""A git repository at one ref in a folder of its own. Again and again the same end, whatever was there before.

An address may bring a token (`https://user:token@host/…`): git gets it, and no log, message or kept file does.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import anyio
import structlog

from comfyfleet.wire.errors import ProvisionFailed

log = structlog.get_logger()

_WORDS = 300
_USERINFO = re.compile(r"(?<=://)[^/\s@]+@")


def without_userinfo(text: str) -> str:
    """`text` without what stands before the `@` of a URL's host."""
    return _USERINFO.sub("", text)


async def checkout(repository: str, ref: str, folder: Path) -> str:
    """Bring `folder` to `ref` ("": the default branch) of `repository`; the commit. Raises ProvisionFailed."""
    for name, value in (("repository", repository), ("ref", ref)):
        if value.startswith("-"):
            raise ProvisionFailed(f"{value!r} is no git {name}", reason="git")
    if not (folder / ".git").is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        await run(["git", "clone", "--quiet", "--no-checkout", repository, str(folder)], what=f"cloning {repository}")
    await run(["git", "remote", "set-url", "origin", repository], cwd=folder, what="git remote")
    await run(["git", "fetch", "--quiet", "--tags", "--force", "origin"], cwd=folder, what=f"fetching {repository}")
    wanted = ref or "origin/HEAD"
    if ref and not await _is_commit(f"origin/{ref}", folder):
        if not await _is_commit(ref, folder):  # a commit that no branch leads to
            await run(["git", "fetch", "--quiet", "origin", ref], cwd=folder, what=f"fetching {ref}")
            wanted = "FETCH_HEAD"
    elif ref:
        wanted = f"origin/{ref}"
    await run(["git", "checkout", "--quiet", "--force", "--detach", wanted], cwd=folder, what=f"checking out {wanted}")
    commit = (await run(["git", "rev-parse", "HEAD"], cwd=folder, what="git rev-parse")).strip()
    if (bare := without_userinfo(repository)) != repository:
        await run(["git", "remote", "set-url", "origin", bare], cwd=folder, what="git remote")
    log.info("repository.checked_out", repository=bare, ref=ref, commit=commit)
    return commit


async def run(command: Sequence[str], *, what: str, cwd: Path | None = None) -> str:
    """What it printed. Raises ProvisionFailed with its last words when it fails."""
    what = without_userinfo(what)
    try:
        done = await anyio.run_process(
            list(command), cwd=cwd, check=False, stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT
        )
    except OSError as problem:
        raise ProvisionFailed(f"{what}: {command[0]} cannot be run: {problem.strerror}", reason="command") from problem
    text = done.stdout.decode("utf-8", "replace")
    if done.returncode != 0:
        last = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
        raise ProvisionFailed(
            f"{what} failed with code {done.returncode}: {without_userinfo(last)[:_WORDS]}", reason="command"
        )
    return text


async def _is_commit(name: str, folder: Path) -> bool:
    done = await anyio.run_process(
        ["git", "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}"], cwd=folder, check=False
    )
    return done.returncode == 0


def venv_python(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


async def make_venv(folder: Path, python: str, requirements: Sequence[str]) -> Path:
    """A virtual environment with `requirements` (pip's arguments); its interpreter. Pip skips what is there."""
    own = venv_python(folder)
    if not own.exists():
        await run([python, "-m", "venv", str(folder)], what="making a virtual environment")
    if requirements:
        pip = [str(own), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements]
        await run(pip, what=f"installing {' '.join(requirements)}")
    return own
