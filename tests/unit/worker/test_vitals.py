"""A dead worker thread is told from a long, silent node."""

from __future__ import annotations

from comfyfleet.worker.engines.learned import Durations
from comfyfleet.worker.engines.vitals import Vitals, is_stalled, is_worker_dead


def signs(**seen):
    healthy = {"silent_s": 0.0, "log_says_dead": False, "log_says_thread_died": False, "lost_threads": 0}
    return Vitals(**{**healthy, "cpu_share": 1.0, **seen})


def test_a_decode_that_is_silent_for_minutes_is_alive():
    assert not is_worker_dead(signs(silent_s=300.0))
    # On a GPU the process may well use no processor meanwhile.
    assert not is_worker_dead(signs(silent_s=300.0, cpu_share=0.0))


def test_the_log_is_believed_after_a_short_silence():
    assert not is_worker_dead(signs(silent_s=0.5, log_says_dead=True))
    assert is_worker_dead(signs(silent_s=3.0, log_says_dead=True))


def test_a_lost_thread_counts_only_when_the_process_is_idle_too():
    assert not is_worker_dead(signs(silent_s=20.0, lost_threads=1, cpu_share=0.9))
    assert is_worker_dead(signs(silent_s=20.0, lost_threads=1, cpu_share=0.0))


def test_both_signs_are_seen_within_thirty_seconds():
    assert is_worker_dead(signs(silent_s=29.0, log_says_thread_died=True, cpu_share=0.0))


def test_a_foreign_engine_gets_three_times_what_its_node_ever_needed():
    durations = Durations()
    durations.learn_node("VAEDecode", 40.0)

    limit_s = durations.silence_limit_s("VAEDecode")

    assert not is_stalled(119.0, limit_s)
    assert is_stalled(121.0, limit_s)
    assert not is_stalled(1000.0, durations.silence_limit_s("NeverSeen"))
