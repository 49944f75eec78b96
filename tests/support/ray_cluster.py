"""A real Ray cluster on this machine: a head and nodes with GPUs that are only counted, ended by their own process ids.

Never `ray stop`: it ends every Ray of the machine. All processes of a cluster carry its folder in their environment,
workers included, which is how stray ones are found at the end.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from comfyfleet.clock import SystemClock
from comfyfleet.control.fleet.ray import RayFleet, RaySettings
from comfyfleet.control.fleet.ray_node import WorkerPlan

MARK = "COMFYFLEET_TEST_RAY"
SOURCE = str(Path(__file__).resolve().parents[2] / "src")
# A node that does not answer is called dead after about 5 s, not 15. For figures: a busy machine needs more patience.
TIGHT = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}
PATIENT = {**TIGHT, "health_check_timeout_ms": 3000, "health_check_failure_threshold": 4}
START_TRIES = 4
FAKE_HEAD_NODE_ID = "f" * 51 + "00000"
IDLE_S = 3  # so long a machine is idle before Ray's autoscaler ends it
MEMORY = "78643200"  # the least that Ray takes for its object store


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class RayCluster:
    """`start` brings up a head and nodes; `node` adds one; the methods below break them."""

    def __init__(
        self, *, system_config: dict[str, int] | None = None, autoscaler: str = "", node_types: dict | None = None
    ) -> None:
        """autoscaler: Ray's, "v1" or "v2", which starts machines of these types by itself."""
        self.folder = Path(tempfile.mkdtemp(prefix="cfray", dir="/tmp"))  # short: sockets' paths have 107 characters
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.system_config = PATIENT if system_config is None else system_config
        self.autoscaler, self.node_types = autoscaler, node_types or {}
        self.nodes: dict[str, psutil.Process] = {}
        self._heads = 0
        self.head_processes: list[psutil.Process] = []

    # --- starting ------------------------------------------------------------------------------------------------
    @property
    def mark(self) -> dict[str, str]:
        """What to put into the environment of a process that is to be ended with the cluster."""
        return {MARK: str(self.folder)}

    def start(self, *, nodes: dict[str, int], labels: str = "") -> RayCluster:
        """nodes: GPUs by name. labels: of all of them."""
        self.start_head()
        with ThreadPoolExecutor() as together:
            list(together.map(lambda one: self.start_node(one[0], gpus=one[1], labels=labels), nodes.items()))
        return self

    def start_head(self) -> None:
        """A head without GPUs, at the cluster's address; a new one knows nothing of the one before."""
        self._heads += 1
        temporary = self.folder / f"h{self._heads}"
        before = self.processes()
        self._ray(
            [
                *("--head", f"--port={self.port}", "--num-cpus=0", "--num-gpus=0", "--include-dashboard=false"),
                *(f"--temp-dir={temporary}", f"--system-config={json.dumps(self.system_config)}"),
                *self._autoscaling(),
            ],
            folder=self.folder / "head",
        )
        self.head_processes = [process for process in self.processes() if process not in before]

    def _autoscaling(self) -> list[str]:
        """What `ray up` would leave on a head: a configuration whose node provider starts raylets of this machine.

        `ray.cluster_utils.AutoscalingCluster` does the same, but ends every Ray of the machine, and reads a file that
        the wheel lacks.
        """
        if not self.autoscaler:
            return ["--no-monitor"]
        config = {
            "cluster_name": "fake",
            "max_workers": 2,
            "upscaling_speed": 1.0,
            "idle_timeout_minutes": IDLE_S / 60,
            "provider": {
                "type": "external",
                "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
                "gcs_address": self.address,
                "use_node_id_as_ip": True,
                "disable_node_updaters": True,
                "disable_launch_config_check": True,
                "head_node_id": FAKE_HEAD_NODE_ID,
                "launch_multiple": True,
            },
            "available_node_types": {
                **self.node_types,
                "ray.head.default": {"resources": {}, "node_config": {}, "max_workers": 0},
            },
            "head_node_type": "ray.head.default",
            "auth": {},
            "file_mounts": {},
            "cluster_synced_files": [],
            "initialization_commands": [],
            "setup_commands": [],
            "head_setup_commands": [],
            "worker_setup_commands": [],
            "head_start_ray_commands": [],
            "worker_start_ray_commands": [],
        }
        path = self.folder / "autoscaling.yaml"
        path.write_text(json.dumps(config))
        return [f"--autoscaling-config={path}"]

    def start_node(self, name: str, *, gpus: int = 2, labels: str = "", ram_gb: float = 0.0) -> None:
        """Again under the same name: the machine is back, with its disk."""
        before = self.processes()
        named = f"name={name}" + (f",{labels}" if labels else "")
        more = [f'--resources={{"gpu_ram_gb": {ram_gb}}}'] if ram_gb else []
        self._ray(
            [f"--address={self.address}", "--num-cpus=1", f"--num-gpus={gpus}", f"--labels={named}", *more],
            folder=self.disk(name),
            first_slot=100 * (1 + sorted(["a", "b", "c", name]).index(name)),
        )
        self.nodes[name] = next(
            process for process in self.processes() if process not in before and _is_raylet_of(process, self.disk(name))
        )

    def _ray(self, arguments: list[str], *, folder: Path, first_slot: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        environment = {
            **{name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ},
            "PYTHONPATH": SOURCE,
            "OMP_NUM_THREADS": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
            "RAY_enable_worker_prestart": "0",
            "RAY_gcs_rpc_server_reconnect_timeout_s": "10",  # so long a raylet outlives its head; 60 by default
            "COMFYFLEET_DATA_DIR": str(folder),
            "COMFYFLEET_FIRST_SLOT": str(first_slot),
            MARK: str(self.folder),
        }
        if self.autoscaler:
            environment |= {
                "RAY_FAKE_CLUSTER": "1",
                "AUTOSCALER_UPDATE_INTERVAL_S": "1",
                "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
                "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
                "RAY_enable_autoscaler_v2": str(int(self.autoscaler == "v2")),
            }
        for left in reversed(range(START_TRIES)):
            before = self.processes()
            done = subprocess.run(
                [
                    *(sys.executable, "-m", "ray.scripts.scripts", "start", *arguments),
                    *(f"--object-store-memory={MEMORY}", "--disable-usage-stats"),
                    *("--min-worker-port=0", "--max-worker-port=0", "--include-log-monitor=false"),
                ],
                env=environment,
                capture_output=True,
                text=True,
                timeout=120,
            )
            if done.returncode == 0:
                return
            # On a busy machine a start gives itself up after 30 s; what it began is ended before the next try.
            ended = [process for process in self.processes() if process not in before and _disk(process) == folder]
            for process in ended:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(ended, timeout=10)
            assert left, done.stdout[-2000:] + done.stderr[-2000:]

    def disk(self, name: str) -> Path:
        """A node's data directory."""
        return self.folder / name

    def fleet(self, folder: Path, *, command: tuple[str, ...] = (), report_url: str = "http://127.0.0.1:9") -> RayFleet:
        """A provider in a namespace of its own, with its memory in `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        return RayFleet(
            RaySettings(
                data_dir=folder,
                address=self.address,
                namespace=f"t{abs(hash(folder))}",
                plan=WorkerPlan(report_url=report_url, command=command),
                inherited={"PATH": os.environ["PATH"], "PYTHONPATH": SOURCE, MARK: str(self.folder)},
            ),
            SystemClock(),
        )

    def wanted(self) -> list[dict[str, float]]:
        """The bundles Ray's autoscaler was asked to have room for, where it reads them: the cluster's own store."""
        from ray._private.ray_constants import AUTOSCALER_RESOURCE_REQUEST_CHANNEL
        from ray._raylet import GcsClient
        from ray.autoscaler.v2.sdk import get_cluster_resource_state

        store = GcsClient(self.address)
        if self.autoscaler == "v2":
            constraints = get_cluster_resource_state(store).cluster_resource_constraints
            return [dict(one.request.resources_bundle) for every in constraints for one in every.resource_requests]
        return json.loads(store.internal_kv_get(AUTOSCALER_RESOURCE_REQUEST_CHANNEL, None) or b"[]")

    # --- breaking ------------------------------------------------------------------------------------------------
    def kill_node(self, name: str) -> None:
        """kill -9 of a raylet; what it started is left to itself."""
        raylet = self.nodes.pop(name)
        raylet.kill()
        raylet.wait(10)

    def freeze_node(self, name: str) -> None:
        """A partition: the raylet neither answers nor dies."""
        self.nodes[name].suspend()

    def thaw_node(self, name: str) -> None:
        self.nodes[name].resume()

    def kill_head(self) -> None:
        """kill -9 of everything the head runs: control store, raylet, monitors."""
        for process in self.head_processes:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(self.head_processes, timeout=10)

    def end_node(self, name: str) -> None:
        """What `systemd` would do before it starts the node anew: end what is left of the old raylet."""
        raylet = self.nodes.pop(name, None)
        if raylet is not None:
            with contextlib.suppress(psutil.Error):
                raylet.kill()
                raylet.wait(10)

    def processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == str(self.folder) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def close(self) -> None:
        """End every process that carries this cluster's folder, until none is left."""
        for _ in range(5):
            left = self.processes()
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.send_signal(signal.SIGKILL)
            psutil.wait_procs(left, timeout=5)
            if not self.processes():
                break
        shutil.rmtree(self.folder, ignore_errors=True)


def _is_raylet_of(process: psutil.Process, disk: Path) -> bool:
    with contextlib.suppress(psutil.Error):
        words = process.cmdline()
        return bool(words) and words[0].endswith("raylet/raylet") and _disk(process) == disk
    return False


def _disk(process: psutil.Process) -> Path | None:
    """The data directory of the node that a process belongs to."""
    with contextlib.suppress(psutil.Error):
        return Path(process.environ().get("COMFYFLEET_DATA_DIR", "/"))
    return None


@contextlib.contextmanager
def ray_cluster(nodes: dict[str, int], *, labels: str = "", **options: object) -> Iterator[RayCluster]:
    cluster = RayCluster(**options)
    try:
        yield cluster.start(nodes=nodes, labels=labels)
    finally:
        cluster.close()


def until(condition, limit_s: float = 60.0, every_s: float = 0.2, tell=lambda: ""):
    """The condition's first true value. For tests that run no event loop. tell: what to say when it never comes."""
    end = time.monotonic() + limit_s
    while not (found := condition()):
        assert time.monotonic() < end, f"not so within {limit_s} s\n{tell()}"
        time.sleep(every_s)
    return found
