"""kill -9 at any moment: no partial file under a final name, nothing fetched twice beyond a chunk a connection."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.model_server import Hosted, a_safetensors_file, model_server

CHUNK, CONNECTIONS = 256 * 1024, 3
CONTENT = a_safetensors_file(24 * 2**20 + 777)
SCRIPT = Path(__file__).resolve().parents[1] / "support" / "download_process.py"


def killed_often(tmp_path: Path, kills: int, seed: int) -> None:
    dice = random.Random(seed)
    final = tmp_path / "checkpoints" / "song.safetensors"
    hosted = Hosted(CONTENT, bytes_per_s=30_000_000)
    with model_server() as server:
        url = server.add("/song", hosted)
        arguments = [sys.executable, str(SCRIPT), url, str(tmp_path), str(CHUNK), str(CONNECTIONS)]
        done = 0
        while done < kills:
            # Mostly in the middle, sometimes at once, sometimes not before its end.
            more = dice.choice([0, dice.randrange(3 * len(CONTENT) // kills), dice.randrange(2 * CHUNK)])
            aim = server.sent("/song") + more
            process = subprocess.Popen(arguments)
            while server.sent("/song") < aim and process.poll() is None:
                time.sleep(0.001)
            time.sleep(dice.random() * 0.01)
            process.kill()
            process.wait()
            done += 1
            if final.exists():
                assert final.read_bytes() == CONTENT, f"seed {seed}: a wrong file after kill {done}"
        subprocess.run(arguments, check=True, timeout=120)

        assert final.read_bytes() == CONTENT, f"seed {seed}"
        assert server.sent("/song") <= len(CONTENT) + kills * CONNECTIONS * CHUNK, f"seed {seed}"
        assert [path.name for path in final.parent.iterdir()] == [final.name]


@pytest.mark.slow
def test_ten_kills_cost_ten_chunks_a_connection_and_no_file(tmp_path: Path):
    killed_often(tmp_path, kills=10, seed=20261122)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(10))
def test_a_hundred_kills(tmp_path: Path, seed: int):
    killed_often(tmp_path, kills=10, seed=seed)
