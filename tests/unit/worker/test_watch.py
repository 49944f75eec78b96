"""What the socket tells about one prompt, and what is made of it."""

from __future__ import annotations

import pytest

from comfyfleet.worker.engines.client import EngineEvent, EventData, Preview, read_picture
from comfyfleet.worker.engines.faults import FaultKind
from comfyfleet.worker.engines.reach import told_folders
from comfyfleet.worker.engines.refusals import refusal, with_nearest
from comfyfleet.worker.engines.watch import PromptWatch, SilenceLimits

pytestmark = pytest.mark.anyio


def event(kind, **data):
    return EngineEvent(type=kind, data=EventData(prompt_id="p", **data))


async def test_steps_count_within_their_node_and_nodes_by_their_weight(clock):
    watch = PromptWatch("p", clock=clock)
    watch.hear(event("execution_start"))
    watch.hear(event("executing", node="load"))
    clock.jump(2.0)
    watch.hear(event("executing", node="sample"))
    clock.jump(1.0)
    watch.hear(event("progress", value=1, max=4))

    assert watch.progress({"load": 10.0, "sample": 80.0, "save": 10.0}) == 30.0
    assert watch.node_seconds == {"load": 2.0}
    assert watch.updates == [{"time": 3.0, "value": 1, "max": 4, "percentage": 25}]

    watch.hear(event("execution_success"))
    assert watch.hint.is_set()
    assert watch.executed == ["load", "sample"]


async def test_a_lost_engine_wakes_whoever_waits(clock):
    watch = PromptWatch("p", clock=clock)

    watch.lose(FaultKind.ENGINE_LOST)

    assert watch.hint.is_set()
    assert watch.lost is FaultKind.ENGINE_LOST


async def test_silence_beyond_the_nodes_own_limit_is_a_stall_and_a_deaf_socket_is_not_silence(clock):
    watch = PromptWatch("p", clock=clock, limits=SilenceLimits(node_s=lambda node: 120.0, run_s=1000.0))
    watch.client_id = "me"
    watch.hear(event("execution_start"))
    watch.hear(event("executing", node="decode"))

    clock.jump(119.0)
    assert not watch.is_stalled("me")
    clock.jump(2.0)
    assert watch.is_stalled("me")
    assert not watch.is_stalled("reconnected")
    clock.jump(900.0)
    assert watch.is_stalled("reconnected")


async def test_a_refusal_names_the_first_bad_input_and_keeps_all_without_paths():
    error = {
        "type": "value_not_in_list",
        "message": "Value not in list",
        "details": "ckpt_name: 'x' not in (list of length 30)",
        "extra_info": {"input_name": "ckpt_name", "received_value": "x", "traceback": ["/srv/app/execution.py"]},
    }
    answer = {
        "error": {"type": "prompt_outputs_failed_validation", "message": "Prompt outputs failed validation"},
        "node_errors": {"4": {"errors": [error], "dependent_outputs": ["9"], "class_type": "CheckpointLoaderSimple"}},
    }

    found = refusal(answer, {})

    assert found.status == 422
    assert (found.details["node_id"], found.details["input"]) == ("4", "ckpt_name")
    assert "CheckpointLoaderSimple" in found.message
    assert "/srv" not in str(found.as_dict())


async def test_an_unknown_node_is_named_from_comfyuis_sentence():
    error = {"type": "invalid_prompt", "message": "node Nope does not exist.", "details": "Node ID '#12'"}

    found = refusal({"error": error, "node_errors": {}}, {"12": {"class_type": "Nope", "inputs": {}}})

    assert (found.details["node_id"], found.details["class_type"]) == ("12", "Nope")


async def test_a_missing_file_is_answered_with_the_nearest_there_is():
    extra = {"input_name": "ckpt_name", "received_value": "sd15-prunned.safetensors"}
    error = {"type": "value_not_in_list", "message": "Value not in list", "details": "", "extra_info": extra}
    answer = {"node_errors": {"4": {"errors": [error], "class_type": "CheckpointLoaderSimple"}}}

    found = with_nearest(refusal(answer, {}), [["ace_step.safetensors", "sd15-pruned.safetensors"], {}])

    assert found.details["nearest"] == "sd15-pruned.safetensors"
    assert "sd15-pruned.safetensors" in found.message
    assert "none at all" in with_nearest(refusal(answer, {}), [[], {}]).message


async def test_an_engine_on_this_machine_tells_its_folders_and_one_elsewhere_does_not(tmp_path):
    (tmp_path / "out").mkdir()
    stats = {"system": {"argv": ["main.py", "--output-directory", str(tmp_path / "out"), "--input-directory", "/in"]}}

    folders = told_folders(stats, "http://127.0.0.1:8188")
    assert folders["output"] == tmp_path / "out"
    assert str(folders["input"]) == "/in"
    assert told_folders(stats, "http://gpu-7:8188") is None
    assert told_folders({"system": {}}, "http://127.0.0.1:8188") is None


async def test_pictures_on_the_way_are_read_in_both_of_comfyuis_forms():
    old = (1).to_bytes(4, "big") + (2).to_bytes(4, "big") + b"PNG"
    told = b'{"prompt_id": "p", "image_type": "image/jpeg"}'
    new = (4).to_bytes(4, "big") + len(told).to_bytes(4, "big") + told + b"JPEG"

    assert read_picture(old) == ("", Preview(mime="image/png", data=b"PNG"))
    assert read_picture(new) == ("p", Preview(mime="image/jpeg", data=b"JPEG"))
    assert read_picture((3).to_bytes(4, "big") + b"text-of-a-node") is None
    assert read_picture(b"") is None
