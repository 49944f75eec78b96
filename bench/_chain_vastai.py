"""The unmodified `vastai` for `bench.chain`, run by the environment that has it: its worker framework, or its client.

python _chain_vastai.py worker MODEL_PORT LOG
python _chain_vastai.py client BASE
"""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
import sys
import time


def worker(port: str, log: str) -> None:
    from vastai import BenchmarkConfig, HandlerConfig, LogActionConfig, Worker, WorkerConfig

    Worker(
        WorkerConfig(
            model_server_url="http://127.0.0.1",
            model_server_port=int(port),
            model_log_file=log,
            model_healthcheck_url="/health",
            handlers=[
                HandlerConfig(
                    route="/generate/sync",
                    allow_parallel_requests=False,
                    max_queue_time=60.0,
                    benchmark_config=BenchmarkConfig(dataset=[{"input": {}}], runs=1, concurrency=1, do_warmup=False),
                )
            ],
            log_action_config=LogActionConfig(on_load=["MODEL READY"], on_error=["MODEL BROKEN"], on_info=[]),
        )
    ).run(host="127.0.0.1")


async def client(base: str) -> None:
    from vastai import Serverless

    logging.disable(logging.CRITICAL)
    graph = {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 0}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "chain"}},
    }
    opened = Serverless("k", autoscaler_url=base, webserver_url=base)
    opened._ssl_context = ssl.create_default_context()  # else it fetches one from a fixed address
    async with opened:
        endpoint = await opened.get_endpoint("chain")

        async def caller(requests: int, took: list[float]) -> None:
            for _ in range(requests):
                began = time.perf_counter()
                outcome = await endpoint.request("/generate/sync", {"input": {"workflow_json": graph}})
                took.append(time.perf_counter() - began)
                if not outcome["ok"]:
                    raise RuntimeError(str(outcome)[:300])

        for line in sys.stdin:
            callers, requests = json.loads(line)
            took: list[float] = []
            began = time.perf_counter()
            await asyncio.gather(*(caller(requests // callers, took) for _ in range(callers)))
            print(json.dumps([took, time.perf_counter() - began]), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "worker":
        worker(sys.argv[2], sys.argv[3])
    else:
        asyncio.run(client(sys.argv[2]))
