"""Drive the real, unmodified `vastai` client in its own environment: a snippet in, a JSON value out.

    answer = run_vastai(f'''
        async with Serverless(KEY, autoscaler_url=BASE, webserver_url=BASE) as client:
            RESULT = [endpoint.name for endpoint in await client.get_endpoints()]
    ''', base=url, key=key)

The snippet is the body of an async function; it leaves its answer in `RESULT`. `BASE`, `KEY` and everything passed as
`values` are at hand, and so are `Serverless`, `VastAI`, `asyncio`, `json`, `time`, and `called(path)`: [url, began,
seconds, status] of each HTTP call to that path (None and 0 while under way, 0 for one without an answer). An exception
ends the test with its traceback.
"""

from __future__ import annotations

import json
import os
import subprocess
import textwrap
from pathlib import Path
from typing import Any

import pytest

_PRELUDE = """
import asyncio, json, sys, time, logging
logging.disable(logging.CRITICAL)
VALUES = json.loads(sys.argv[1])
globals().update(VALUES)
from vastai import Serverless, CoroutineServerless, VastAI
Serverless.SSL_CERT_URL = BASE + "/static/jvastai_root.cer"
CoroutineServerless.SSL_CERT_URL = Serverless.SSL_CERT_URL

import aiohttp
CALLS = []

async def _counted(self, method, url, _inner=aiohttp.ClientSession._request, **options):
    call = [str(url).split("?")[0], time.monotonic(), None, 0]
    CALLS.append(call)
    try:
        answer = await _inner(self, method, url, **options)
        call[3] = answer.status
        return answer
    finally:
        call[2] = time.monotonic() - call[1]

aiohttp.ClientSession._request = _counted

def called(path):
    return [call for call in CALLS if call[0].endswith(path)]

async def main():
    RESULT = None
%s
    return RESULT

print("\\n@@" + json.dumps(asyncio.run(main()), default=repr))
"""


def vastai_python() -> Path:
    """The interpreter that has the real client: COMFYFLEET_VASTAI_PYTHON, else the one `make setup` made."""
    given = os.environ.get("COMFYFLEET_VASTAI_PYTHON")
    path = Path(given) if given else Path(__file__).resolve().parents[2] / ".venv-vastai" / "bin" / "python"
    if not path.exists():
        pytest.skip(f"the real vastai client is not installed ({path}); `make setup` installs it")
    return path


def environment() -> dict[str, str]:
    """Nothing of this machine's own settings: no key, no VAST_URL, no proxy."""
    kept = ("PATH", "HOME", "LANG", "TMPDIR")
    return {**{name: os.environ[name] for name in kept if name in os.environ}, "XDG_CONFIG_HOME": "/nonexistent"}


def run_vastai(snippet: str, *, base: str, key: str, timeout_s: float = 180.0, **values: Any) -> Any:
    """The snippet's RESULT."""
    script = _PRELUDE % textwrap.indent(textwrap.dedent(snippet), "    ")
    done = subprocess.run(
        [str(vastai_python()), "-c", script, json.dumps({"BASE": base, "KEY": key, **values})],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=environment(),
        check=False,
    )
    _, mark, answer = done.stdout.rpartition("\n@@")
    if done.returncode != 0 or not mark:
        pytest.fail(f"the vastai snippet failed ({done.returncode}):\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(answer)


def run_vastai_command(*arguments: str, base: str, key: str, timeout_s: float = 180.0) -> subprocess.CompletedProcess:
    """The real command line: `vastai <arguments>` against our control plane."""
    command = [str(vastai_python().with_name("vastai")), *arguments, "--url", base, "--api-key", key]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment(), check=False)
