"""The ledger of a staged download: what counts after a kill, a torn line, a power cut."""

from __future__ import annotations

from comfyfleet.provision.chunks import Identity, create_ledger, read_ledger

WHAT = Identity(size_bytes=1050, etag='"v1"')


def a_ledger(path, boot_id="boot-1"):
    return create_ledger(path, WHAT, chunk_bytes=100, sync=lambda: None, boot_id=boot_id)


def again(path, boot_id="boot-1"):
    return read_ledger(path, sync=lambda: None, boot_id=boot_id)


def numbers(ledger):
    return [chunk.number for chunk in ledger.missing]


def test_what_was_added_is_there_after_a_kill(tmp_path):
    ledger = a_ledger(tmp_path / "l")
    for chunk in (ledger.missing[0], ledger.missing[2]):
        ledger.add(chunk)

    found = again(tmp_path / "l")

    assert numbers(found) == [1, 3, 4, 5, 6, 7, 8, 9, 10]
    assert found.prefix_bytes() == 100
    assert found.done_bytes == 200


def test_the_last_chunk_is_short(tmp_path):
    last = a_ledger(tmp_path / "l").missing[-1]

    assert (last.start, last.end) == (1000, 1050)


def test_a_torn_line_is_no_other_chunks_number(tmp_path):
    path = tmp_path / "l"
    ledger = a_ledger(path)
    ledger.add(ledger.missing[10])
    path.write_bytes(path.read_bytes()[:-2])  # "10\n" became "1"

    found = again(path)
    found.add(found.missing[2])

    assert numbers(again(path)) == [0, 1, 3, 4, 5, 6, 7, 8, 9, 10]


def test_after_a_power_cut_only_what_was_forced_to_disk_counts(tmp_path):
    ledger = a_ledger(tmp_path / "l")
    ledger.add(ledger.missing[0])
    ledger.sync()
    ledger.add(ledger.missing[0])

    assert numbers(again(tmp_path / "l", boot_id="boot-2")) == list(range(1, 11))
    # And that is final: the lost chunk does not come back with the next look.
    assert numbers(again(tmp_path / "l", boot_id="boot-2")) == list(range(1, 11))


def test_a_ledger_that_cannot_be_read_is_no_ledger(tmp_path):
    (tmp_path / "l").write_bytes(b"{\n1\n")

    assert again(tmp_path / "l") is None
    assert again(tmp_path / "none") is None


def test_bytes_are_continued_only_where_something_says_that_they_are_the_same():
    assert Identity(size_bytes=5, etag='"a"').continues(Identity(size_bytes=5, etag='"a"'))
    assert Identity(size_bytes=5, etag='"a"', sha256="d").continues(Identity(size_bytes=5, etag='"b"', sha256="d"))
    assert not Identity(size_bytes=5).continues(Identity(size_bytes=5))
    assert not Identity(size_bytes=6, etag='"a"').continues(Identity(size_bytes=5, etag='"a"'))
    assert not Identity(size_bytes=5, etag='"a"', sha256="d").continues(Identity(size_bytes=5, etag='"a"', sha256="e"))
