"""A workergroup's hardware parameters: the search is held against the machine, and a miss is told with its reason."""

from __future__ import annotations

import pytest

from comfyfleet.control.checkup import ailment
from comfyfleet.control.fleet.base import FleetNode, NoCapacity, WorkerSpec
from comfyfleet.control.fleet.local import LocalFleet, LocalSettings
from comfyfleet.control.search import parse_search
from comfyfleet.control.worker import Worker
from comfyfleet.control.worker_states import WorkerState
from comfyfleet.testing.clock import FakeClock

pytestmark = pytest.mark.anyio
CARD = FleetNode(
    name="here", address="127.0.0.1", is_alive=True, gpus=2.0, gpu_name="NVIDIA GeForce RTX 4090", gpu_ram_gb=25.8
)


def a_fleet(tmp_path, machine: FleetNode | None) -> LocalFleet:
    settings = LocalSettings(
        data_dir=tmp_path,
        report_url="http://127.0.0.1:1",
        slots=0,  # so that what fits is told by the next refusal, and nothing is started
        base_environment={},
        machine=machine,
    )
    return LocalFleet(settings, FakeClock())


def a_spec(text: str) -> WorkerSpec:
    return WorkerSpec(id=1, mtoken="t", incarnation="i", search_params=text, search=parse_search(text))


@pytest.mark.parametrize(
    "text",
    ["gpu_ram>=48", "gpu_name=H100", "num_gpus>=4", "gpu_ram>=24 gpu_name notin [RTX_4090,RTX_3090]", "dph_total<0.3"],
)
async def test_a_machine_that_is_not_what_is_searched_for_gets_no_worker_and_says_why(tmp_path, text):
    with pytest.raises(NoCapacity) as refused:
        await a_fleet(tmp_path, CARD).create(a_spec(text))

    if "dph" not in text:
        assert text in refused.value.message
        assert "2 x NVIDIA GeForce RTX 4090 with 25.8 GB" in refused.value.message
    assert await a_fleet(tmp_path, CARD).list() == []


@pytest.mark.parametrize(
    "text",
    ["", "gpu_ram>=24", "gpu_name in [RTX_4090]", "num_gpus=1", "verified=True rentable=True rented=False"],
)
async def test_a_machine_that_fits_is_refused_only_for_lack_of_room(tmp_path, text):
    with pytest.raises(NoCapacity, match="slots of this machine are taken"):
        await a_fleet(tmp_path, CARD).create(a_spec(text))


async def test_a_machine_that_knows_no_card_is_not_held_against_searches_for_one(tmp_path):
    bare = FleetNode(name="here", address="127.0.0.1", is_alive=True, gpus=1.0)

    with pytest.raises(NoCapacity, match="slots of this machine are taken"):
        await a_fleet(tmp_path, bare).create(a_spec("gpu_ram>=80"))


def test_gpu_ram_stands_for_what_a_worker_downloads_so_a_start_may_take_longer():
    worker = Worker(
        id=1,
        endpoint_id=1,
        group_id=1,
        mtoken="t",
        created_at=0.0,
        state=WorkerState.LOADING,
        started_at=1.0,
        last_report_at=3 * 3600.0,
    )

    assert "not ready 2 h after" in ailment(worker, None, has_provider=False, now=3 * 3600.0, download_gb=24.0)
    assert ailment(worker, None, has_provider=False, now=3 * 3600.0, download_gb=200.0) == ""
