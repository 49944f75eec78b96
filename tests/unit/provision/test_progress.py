"""The sentence that a user reads while models come."""

from __future__ import annotations

from comfyfleet.provision.progress import FileProgress, Progress, duration, size


def test_the_sentence_says_file_share_and_time_left():
    done = FileProgress(name="a", size_bytes=100, done_bytes=100, is_finished=True)
    half = FileProgress(name="b", size_bytes=1000, done_bytes=0)
    progress = Progress(files=[done, half])
    progress.describe(0.0)

    half.done_bytes = half.fetched_bytes = 351

    assert progress.describe(10.0) == "downloading 2 of 2, 41 %, 18 s left"


def test_an_unknown_size_gives_no_share():
    assert Progress(files=[FileProgress(name="a")]).describe(0.0) == "downloading 1 of 1"


def test_waiting_for_another_process_is_said():
    progress = Progress(files=[FileProgress(name="a", note="another process downloads a")])

    assert progress.describe(0.0) == "downloading 1 of 1, another process downloads a"


def test_times_and_sizes_read_well():
    assert [duration(s) for s in (0.2, 45, 120, 7200)] == ["1 s", "45 s", "2 min", "2 h"]
    assert [size(n) for n in (999, 6_735_906_897, 3 * 10**12)] == ["999 B", "6.74 GB", "3.00 TB"]
