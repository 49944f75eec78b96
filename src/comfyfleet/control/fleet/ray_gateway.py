"""The process between a control plane and Ray: one JSON request a line on stdin, one JSON reply a line on stdout.

It exists because Ray ends every process that was connected to a head which stays away, and because its threads and its
memory are no good company for a control plane. It ends when stdin does. `ray_link` starts it and talks to it.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

import msgspec

from comfyfleet.clock import SystemClock
from comfyfleet.control.fleet.base import WorkerSpec
from comfyfleet.control.fleet.ray_demand import Wish
from comfyfleet.control.fleet.ray_node import WorkerPlan
from comfyfleet.wire.errors import FleetError

THREADS = 32


class Hello(msgspec.Struct, frozen=True, kw_only=True):
    """The first line on stdin."""

    address: str
    namespace: str
    plan: WorkerPlan


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """A request; which fields count depends on `op`."""

    number: int
    op: str
    spec: WorkerSpec | None = None
    worker_id: int = 0
    node_id: str = ""
    grace_s: float = 0.0
    tail: int = 0
    owner: str = ""
    held: dict[int, Wish] = {}
    refused: list[Wish] = []


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """error: "" for a success, a FleetError's code, or "failed". result: JSON of what the op returns."""

    number: int
    error: str = ""
    message: str = ""
    result: msgspec.Raw = msgspec.Raw(b"null")


def main() -> None:
    """Connect, say so (`number` 0), answer until stdin ends."""
    # Ray prints where it likes; our lines have the real stdout for themselves.
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    hello = msgspec.json.decode(sys.stdin.buffer.readline(), type=Hello)
    from comfyfleet.control.fleet.ray_cluster import Cluster  # imports Ray: two seconds

    cluster = Cluster(address=hello.address, namespace=hello.namespace, plan=hello.plan, clock=SystemClock())
    writing = threading.Lock()

    def send(reply: Reply, to: BinaryIO = replies) -> None:
        with writing:
            to.write(msgspec.json.encode(reply) + b"\n")
            to.flush()

    try:
        cluster.connect()
    except Exception as problem:  # process boundary: whatever Ray raises, the control plane is to show
        send(Reply(number=0, error="failed", message=_first_line(problem)))
        os._exit(1)
    send(Reply(number=0))
    with ThreadPoolExecutor(THREADS) as threads:
        for line in sys.stdin.buffer:
            threads.submit(_answer, cluster, msgspec.json.decode(line, type=Question), send)
        os._exit(0)  # Ray's own way out may take seconds


def _answer(cluster: Any, question: Question, send: Callable[[Reply], None]) -> None:
    try:
        result = _ask(cluster, question)
    except FleetError as problem:
        send(Reply(number=question.number, error=problem.code, message=problem.message))
    except Exception as problem:  # request boundary
        send(Reply(number=question.number, error="failed", message=f"{type(problem).__name__}: {_first_line(problem)}"))
    else:
        send(Reply(number=question.number, result=msgspec.Raw(msgspec.json.encode(result))))


def _ask(cluster: Any, question: Question) -> object:
    number, grace_s = question.worker_id, question.grace_s
    ops: dict[str, Callable[[], object]] = {
        "look": cluster.look,
        "create": lambda: cluster.create(question.spec),
        "start": lambda: cluster.start(question.spec),
        "stop": lambda: cluster.stop(number, grace_s),
        "destroy": lambda: cluster.destroy(number, grace_s),
        "clear": lambda: cluster.clear(question.node_id, number),
        "logs": lambda: cluster.logs(number, question.tail),
        "demand": lambda: cluster.demand(question.owner, question.held, question.refused),
    }
    return ops[question.op]()


def _first_line(problem: Exception) -> str:
    return (str(problem) or type(problem).__name__).strip().splitlines()[0][:300]


if __name__ == "__main__":
    main()
