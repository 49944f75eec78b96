"""Whose fault, and what next: the table of remedies, and what a client may see of an error."""

from __future__ import annotations

import pytest

from comfyfleet.worker.engines.faults import (
    CLASS_OF,
    FaultClass,
    FaultKind,
    Remedy,
    from_error_message,
    kind_of_node_error,
    remedy_for,
    without_paths,
)


@pytest.mark.parametrize(
    ("exception_type", "message", "kind"),
    [
        ("torch.OutOfMemoryError", "Allocation on device", FaultKind.OUT_OF_MEMORY),
        ("torch.cuda.OutOfMemoryError", "CUDA out of memory. Tried to allocate 2 GiB", FaultKind.OUT_OF_MEMORY),
        ("RuntimeError", "[enforce fail] DefaultCPUAllocator: can't allocate memory", FaultKind.OUT_OF_MEMORY),
        ("torch.AcceleratorError", "CUDA error: device-side assert triggered", FaultKind.DEVICE),
        ("RuntimeError", "CUDA error: an illegal memory access was encountered", FaultKind.DEVICE),
        ("OSError", "[Errno 28] No space left on device", FaultKind.DISK_FULL),
        ("ValueError", "the device name is wrong", FaultKind.NODE_ERROR),
    ],
)
def test_a_nodes_error_is_classed_by_what_it_says(exception_type, message, kind):
    assert kind_of_node_error(exception_type, message) is kind


def test_every_kind_has_a_class_and_a_remedy():
    for kind in FaultKind:
        assert CLASS_OF[kind] in FaultClass
        assert remedy_for(kind, ()) in Remedy


@pytest.mark.parametrize("kind", list(FaultKind))
def test_no_kind_is_retried_for_ever_and_only_a_lost_engine_more_than_once(kind):
    last = 3 if kind is FaultKind.ENGINE_LOST else 1

    assert remedy_for(kind, (kind,) * last) in (Remedy.FAIL, Remedy.RESTART_AND_FAIL)


def test_a_jobs_own_error_is_never_retried_and_memory_is_freed_first():
    assert remedy_for(FaultKind.NODE_ERROR, ()) is Remedy.FAIL
    assert remedy_for(FaultKind.OUT_OF_MEMORY, ()) is Remedy.FREE_AND_RETRY
    assert remedy_for(FaultKind.DEVICE, ()) is Remedy.RESTART_AND_RETRY


def test_node_and_reason_survive_and_server_paths_do_not():
    fault = from_error_message(
        {
            "node_id": "7",
            "node_type": "LoadImage",
            "exception_type": "FileNotFoundError",
            "exception_message": "No such file: '/workspace/ComfyUI/input/cat.png'\n",
            "traceback": ["File /workspace/ComfyUI/execution.py"],
            "executed": ["1"],
        }
    )

    assert fault.message == "node 7 (LoadImage): No such file: 'cat.png'"
    assert fault.details["executed"] == ["1"]
    assert "traceback" not in fault.details


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("see /opt/app/models/vae/x.safetensors", "see x.safetensors"),
        ("C:\\ComfyUI\\models\\x.ckpt is broken", "x.ckpt is broken"),
        ("ratio 1/2 and a/b stay", "ratio 1/2 and a/b stay"),
        ("https://example.com/a/b stays", "https://example.com/a/b stays"),
    ],
)
def test_absolute_paths_are_cut_to_their_last_part(text, shown):
    assert without_paths(text) == shown
