"""Results are kept within a limit in bytes, the least recently used ones go first, shared weights count once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import given
from hypothesis import strategies as st

from comfyfleet.engine.cache import ENTRY_BYTES, Result, ResultCache, measure
from comfyfleet.engine.memory import Residency
from comfyfleet.engine.values import Audio, Latent


@dataclass
class Weights:
    key: str
    size_bytes: int
    device: str = "cpu"

    def move_to(self, device: str) -> None:
        self.device = device

    def __hash__(self) -> int:
        return id(self)


def tensor_of(size_bytes: int) -> Result:
    return Result(outputs=(torch.zeros(size_bytes, dtype=torch.uint8),))


def test_the_least_recently_used_result_goes_first() -> None:
    cache = ResultCache(3 * (1000 + ENTRY_BYTES))
    for name in "abc":
        cache.put(name, tensor_of(1000))
    cache.get("a")

    cache.put("d", tensor_of(1000))

    assert cache.get("b") is None
    assert all(cache.get(name) for name in "acd")


def test_a_result_too_large_for_the_cache_pushes_nothing_out() -> None:
    cache = ResultCache(5000)
    cache.put("small", tensor_of(100))

    cache.put("huge", tensor_of(10_000))

    assert cache.get("small")
    assert cache.get("huge") is None


def test_weights_shared_by_several_results_count_once_and_go_with_the_last() -> None:
    cache = ResultCache(100_000)
    cache.put("loader", Result(outputs=(Weights("w", 50_000),)))
    cache.put("patched", Result(outputs=(Weights("w", 50_000),)))

    assert cache.size_bytes == 50_000 + 2 * ENTRY_BYTES
    cache.drop_holding_weights()
    assert (len(cache), cache.size_bytes) == (0, 0)


def test_what_a_value_holds_is_measured_through_its_parts() -> None:
    latent = Latent(samples=torch.zeros(10), noise_mask=torch.zeros(5))
    audio = Audio(waveform=torch.zeros(2, 3), sample_rate_hz=1)

    holding = measure((latent, [audio], {"text": "abc"}, Weights("w", 7)))

    assert holding.own_bytes == 3 + ENTRY_BYTES
    assert sum(holding.shared.values()) == 4 * (10 + 5 + 6) + 7
    assert holding.shared["weights w"] == 7
    assert holding.has_weights


def test_the_same_frames_as_pictures_and_as_a_film_count_once() -> None:
    frames = torch.zeros(1000, dtype=torch.uint8)
    cache = ResultCache(1 << 20)
    cache.put("pictures", Result(outputs=(frames,)))
    cache.put("film", Result(outputs=(Latent(samples=frames[:10]),)))

    assert cache.size_bytes == 1000 + 2 * ENTRY_BYTES


@given(steps=st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 4000)), max_size=40))
def test_the_limit_holds_and_the_count_is_right_whatever_comes(steps: list[tuple[str, int]]) -> None:
    cache = ResultCache(8000)
    kept: dict[str, int] = {}
    for name, size in steps:
        cache.put(name, tensor_of(size))
        kept[name] = size

        assert cache.size_bytes <= 8000
        found = [name for name in kept if cache.get(name)]
        assert cache.size_bytes == sum(kept[name] + ENTRY_BYTES for name in found)


def test_models_move_off_the_device_least_recently_used_first() -> None:
    residency = Residency("cuda:0", 100)
    first, second, third = (Weights(name, 40) for name in "abc")
    residency.use(first)
    residency.use(second)
    residency.use(first)

    residency.use(third)

    assert [model.device for model in (first, second, third)] == ["cuda:0", "cpu", "cuda:0"]
    assert residency.size_bytes == 80


def test_a_model_that_nobody_holds_takes_no_room() -> None:
    residency = Residency("cuda:0", 100)
    residency.use(Weights("gone", 90))

    assert residency.size_bytes == 0


def test_unloading_moves_everything_off() -> None:
    residency = Residency("cuda:0", 100)
    model = Weights("a", 40)
    residency.use(model)

    residency.release_all()

    assert (model.device, residency.size_bytes) == ("cpu", 0)
