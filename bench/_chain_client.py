"""Our client at work for `bench.chain`: reads `[callers, count]` lines, answers `[seconds of each, seconds of all]`."""

from __future__ import annotations

import json
import sys
import time
from itertools import count

import anyio

from comfyfleet import Serverless

GRAPH = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 0}},
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "chain"}},
}


async def main(base: str, key: str) -> None:
    colors = count(1)
    async with Serverless(key, url=base) as client:
        endpoint = await client.get_endpoint("chain")

        async def caller(requests: int, took: list[float]) -> None:
            for _ in range(requests):
                color = next(colors)  # a picture of its own, so that no cache answers
                picture = {**GRAPH["1"], "inputs": {**GRAPH["1"]["inputs"], "color": color}}
                began = time.perf_counter()
                outcome = await endpoint.request(
                    "/generate/sync", {"input": {"workflow_json": {**GRAPH, "1": picture}}}
                )
                took.append(time.perf_counter() - began)
                if not outcome["ok"]:
                    raise RuntimeError(outcome["text"][:300])

        for line in sys.stdin:
            callers, requests = json.loads(line)
            took: list[float] = []
            began = time.perf_counter()
            async with anyio.create_task_group() as group:
                for _ in range(callers):
                    group.start_soon(caller, requests // callers, took)
            print(json.dumps([took, time.perf_counter() - began]), flush=True)


if __name__ == "__main__":
    anyio.run(main, sys.argv[1], sys.argv[2])
