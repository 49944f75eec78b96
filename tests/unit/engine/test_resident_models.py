"""Which model files are in memory after a run: what routing asks before it sends a job somewhere."""

from __future__ import annotations

import gc

from comfyfleet.engine.memory import Residency


class Weights:
    def __init__(self, size_bytes: int) -> None:
        self.size_bytes, self.device = size_bytes, "cpu"

    def move_to(self, device: str) -> None:
        self.device = device


def test_a_file_is_in_memory_while_something_of_it_is_on_the_device():
    memory, wan, ace = Residency("cuda:0", 100), Weights(80), Weights(60)
    memory.came_from(wan, {"wan.safetensors"})
    memory.came_from(ace, {"ace.safetensors"})
    assert memory.files() == ()

    memory.use(wan)
    assert memory.files() == ("wan.safetensors",)
    memory.use(ace)  # no room for both
    assert memory.files() == ("ace.safetensors",)


def test_a_model_with_a_lora_is_known_by_both_files():
    memory, base, changed = Residency("cpu", 1000), Weights(80), Weights(80)
    memory.came_from(base, {"wan.safetensors"})
    memory.came_from(changed, {"detail.safetensors"} | memory.files_of(base))
    memory.use(changed)

    assert memory.files() == ("detail.safetensors", "wan.safetensors")


def test_weights_that_nobody_holds_any_more_are_not_in_memory():
    memory, wan = Residency("cpu", 1000), Weights(80)
    memory.came_from(wan, {"wan.safetensors"})
    memory.use(wan)
    del wan
    gc.collect()

    assert memory.files() == ()
