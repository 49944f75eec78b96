"""Every statement, named, with one line of purpose. One text for SQLite and PostgreSQL.

`:name` is a parameter. `{(:a, :b)}` stands for as many rows as there are (`batches`); both databases call the columns
of such rows column1, column2 …
"""

from __future__ import annotations

import re

PARAMETER = re.compile(r"(?<!:):([a-z_][a-z_0-9]*)")

# --- records ---------------------------------------------------------------------------------------------------------

# all_records: every record of one kind.
ALL_RECORDS = "SELECT body FROM record WHERE kind = :kind"

# name_holder: who else has this name among the living of a kind.
NAME_HOLDER = "SELECT id FROM record WHERE kind = :kind AND name = :name AND id <> :id"

# put_record: insert or replace.
PUT_RECORD = """
INSERT INTO record (kind, id, name, body) VALUES (:kind, :id, :name, :body)
ON CONFLICT (kind, id) DO UPDATE SET name = excluded.name, body = excluded.body"""

# drop_record: remove one.
DROP_RECORD = "DELETE FROM record WHERE kind = :kind AND id = :id"

# reserve: hand out the next :count numbers of a counter.
RESERVE = """
INSERT INTO counter (name, next) VALUES (:name, 1 + :count)
ON CONFLICT (name) DO UPDATE SET next = counter.next + :count RETURNING next"""

# bump: a counter grows by one.
BUMP = """
INSERT INTO counter (name, next) VALUES (:name, 1)
ON CONFLICT (name) DO UPDATE SET next = counter.next + 1"""

# counter: where one stands.
COUNTER = "SELECT next FROM counter WHERE name = :name"

# record: one of a kind.
RECORD = "SELECT body FROM record WHERE kind = :kind AND id = :id"

# --- replicas and what they own ({now}: the database's clock, epoch seconds) ------------------------------------------

# enrol: a new control plane on the roll.
ENROL = "INSERT INTO replica (id, url, fleet, expires_at) VALUES (:id, :url, :fleet, {now} + :lease_s)"

# renew_replica: only a lease that stands can be renewed.
RENEW_REPLICA = "UPDATE replica SET expires_at = {now} + :lease_s WHERE id = :id AND expires_at > {now}"

# strike_off: leases that are over end here; what they owned is free.
STRIKE_OFF = "DELETE FROM replica WHERE expires_at <= {now}"

# roll: who is alive.
ROLL = "SELECT id, url, fleet FROM replica ORDER BY id"

# deeds: every endpoint's owner, dead ones included.
DEEDS = "SELECT endpoint_id, replica_id, fence FROM ownership ORDER BY endpoint_id"

# first_deed: an endpoint that nobody ever owned.
FIRST_DEED = """
INSERT INTO ownership (endpoint_id, replica_id, fence) VALUES (:endpoint_id, :replica_id, 1)
ON CONFLICT (endpoint_id) DO NOTHING RETURNING fence"""

# take_deed: one whose owner is off the roll, and that nobody took since it was looked at.
TAKE_DEED = """
UPDATE ownership SET replica_id = :replica_id, fence = fence + 1
 WHERE endpoint_id = :endpoint_id AND fence = :seen
   AND NOT EXISTS (SELECT 1 FROM replica WHERE replica.id = ownership.replica_id)
RETURNING fence"""

# release_deed: the owner lets go.
RELEASE_DEED = "UPDATE ownership SET replica_id = '' WHERE endpoint_id = :endpoint_id AND fence = :fence"

# leave: off the roll.
LEAVE = "DELETE FROM replica WHERE id = :id"

# hold_deed: the fence is still the endpoint's; with a share lock it stays so until the transaction ends.
HOLD_DEED = "SELECT fence FROM ownership WHERE endpoint_id = :endpoint_id AND fence = :fence"

# add_use, all_use: what each key used, at all replicas together.
ADD_USE = """
INSERT INTO scope_use (scope, requests, seconds) VALUES (:scope, :requests, :seconds)
ON CONFLICT (scope) DO UPDATE SET requests = scope_use.requests + :requests, seconds = scope_use.seconds + :seconds"""
ALL_USE = "SELECT scope, requests, seconds FROM scope_use ORDER BY scope"

# first_shared, shared: what all replicas share, sealed.
FIRST_SHARED = "INSERT INTO record (kind, id, body) VALUES ('secret', :id, :body) ON CONFLICT DO NOTHING"
SHARED = "SELECT body FROM record WHERE kind = 'secret' AND id = :id"

# --- what happened ---------------------------------------------------------------------------------------------------

# add_decision: a scaling decision with its inputs.
ADD_DECISION = """
INSERT INTO decision (id, endpoint_id, at, sentence, inputs, outcome)
VALUES (:id, :endpoint_id, :at, :sentence, :inputs, :outcome)"""

# decisions: an endpoint's, newest first.
DECISIONS = """
SELECT id, endpoint_id, at, sentence, inputs, outcome FROM decision
 WHERE endpoint_id = :endpoint_id AND id < :before_id ORDER BY id DESC LIMIT :limit"""

# forget_decisions: keep the newest :keep of an endpoint.
FORGET_DECISIONS = """
DELETE FROM decision WHERE endpoint_id = :endpoint_id AND id <= (
  SELECT id FROM decision WHERE endpoint_id = :endpoint_id ORDER BY id DESC LIMIT 1 OFFSET :keep)"""

# add_log: a line of an endpoint's or workergroup's log.
ADD_LOG = """
INSERT INTO log_line (id, endpoint_id, workergroup_id, at, level, text)
VALUES (:id, :endpoint_id, :workergroup_id, :at, :level, :text)"""

# endpoint_logs, workergroup_logs: the newest :tail lines, newest first.
ENDPOINT_LOGS = """
SELECT endpoint_id, workergroup_id, at, level, text FROM log_line
 WHERE endpoint_id = :id ORDER BY id DESC LIMIT :tail"""
WORKERGROUP_LOGS = """
SELECT endpoint_id, workergroup_id, at, level, text FROM log_line
 WHERE workergroup_id = :id ORDER BY id DESC LIMIT :tail"""

# forget_logs: lines older than.
FORGET_LOGS = "DELETE FROM log_line WHERE at < :before"

# add_usage: an entry of the ledger.
ADD_USAGE = """
INSERT INTO usage (id, endpoint_id, workergroup_id, worker_id, scope, kind, started_at, seconds, price)
VALUES (:id, :endpoint_id, :workergroup_id, :worker_id, :scope, :kind, :started_at, :seconds, :price)"""

# usage_sums: the ledger over a time.
USAGE_SUMS = """
SELECT endpoint_id, scope, kind, sum(seconds), sum(price) FROM usage
 WHERE started_at >= :since AND started_at < :until AND (:any_scope = 1 OR scope = :scope)
 GROUP BY endpoint_id, scope, kind ORDER BY endpoint_id, scope, kind"""

# --- durable jobs ----------------------------------------------------------------------------------------------------

# What a job is from the start, and what becomes of it.
NEW_JOB_COLUMNS = (
    "id",
    "endpoint_id",
    "scope",
    "status",
    "priority",
    "cost",
    "rank",
    "created_at",
    "not_before",
    "input",
    "digest",
    "deadline_at",
    "idempotency_key",
    "shape",
    "models",
    "sealed",
    "metadata",
    "webhook",
    "attempts",
    "lost_workers",
)
JOB_COLUMNS = (
    *NEW_JOB_COLUMNS,
    "lease_token",
    "lease_expires",
    "worker_id",
    "worker_url",
    "request_idx",
    "cancel_requested",
    "started_at",
    "finished_at",
    "result",
    "error",
)
_JOB = ", ".join(JOB_COLUMNS)
_JOB_WITHOUT_INPUT = ", ".join("'' AS input" if name == "input" else name for name in JOB_COLUMNS)
HEAD_COLUMNS = (
    "id",
    "endpoint_id",
    "scope",
    "priority",
    "cost",
    "rank",
    "created_at",
    "shape",
    "models",
    "lost_workers",
)

# add_jobs: new jobs, which no worker has had; a row less than asked for means that an idempotency key is taken.
ADD_JOBS = f"""
INSERT INTO job ({", ".join(NEW_JOB_COLUMNS)}, cancel_requested, webhook_state)
VALUES {{({", ".join(f":{name}" for name in NEW_JOB_COLUMNS)}, 0, 'none')}}
ON CONFLICT DO NOTHING"""  # noqa: S608 - column names of ours only

# known_ids: which of these jobs are stored.
KNOWN_IDS = "SELECT id FROM job WHERE id IN (VALUES {(:id)})"

# job_by_key: the job that has an idempotency key.
JOB_BY_KEY = f"SELECT {_JOB} FROM job WHERE scope = :scope AND idempotency_key = :idempotency_key"  # noqa: S608

# job_by_id.
JOB_BY_ID = f"SELECT {_JOB} FROM job WHERE id = :id"  # noqa: S608

# list_jobs: newest first, page by page.
LIST_JOBS = f"""
SELECT {_JOB_WITHOUT_INPUT} FROM job
 WHERE (:any_scope = 1 OR scope = :scope) AND (:any_endpoint = 1 OR endpoint_id = :endpoint_id)
   AND (:any_status = 1 OR status = :status)
   AND (created_at < :before_at OR (created_at = :before_at AND id < :before_id))
 ORDER BY created_at DESC, id DESC LIMIT :limit"""  # noqa: S608

# waiting: what waits, per endpoint and scope.
WAITING = """
SELECT endpoint_id, scope, count(*), sum(cost), min(created_at) FROM job
 WHERE status = 'queued' GROUP BY endpoint_id, scope"""

# position: how many go before one.
POSITION = """
SELECT count(*) FROM job
 WHERE status = 'queued' AND endpoint_id = :endpoint_id AND scope = :scope
   AND (rank < :rank OR (rank = :rank AND id < :id))"""

# head: the next waiting job of a scope.
HEAD = f"""
SELECT {", ".join(HEAD_COLUMNS)} FROM job
 WHERE status = 'queued' AND endpoint_id = :endpoint_id AND scope = :scope AND not_before <= :now
 ORDER BY rank, id LIMIT 1"""  # noqa: S608

# lease: a waiting job becomes a worker's; no row changed means it waits no more.
LEASE = f"""
UPDATE job SET status = 'leased', lease_token = :token, lease_expires = :expires_at, worker_id = :worker_id,
               worker_url = :worker_url, request_idx = :request_idx, attempts = attempts + 1
 WHERE id = :job_id AND status = 'queued' RETURNING {_JOB}"""  # noqa: S608

# leased: every job some worker has.
LEASED = f"SELECT {_JOB} FROM job WHERE status IN ('leased', 'running')"  # noqa: S608

# take_over: another holder, the same worker.
TAKE_OVER = """
UPDATE job SET lease_token = :token, lease_expires = :expires_at WHERE id = :id AND lease_token = :old_token"""

# renew_many: the holders go on.
RENEW_MANY = """
UPDATE job SET lease_expires = CAST(v.column3 AS DOUBLE PRECISION) FROM (VALUES {(:id, :token, :expires_at)}) AS v
 WHERE job.id = v.column1 AND job.lease_token = v.column2 RETURNING job.id"""

# start_many: the workers have begun.
START_MANY = """
UPDATE job SET status = 'running', started_at = coalesce(started_at, CAST(v.column3 AS DOUBLE PRECISION))
  FROM (VALUES {(:id, :token, :now)}) AS v WHERE job.id = v.column1 AND job.lease_token = v.column2 RETURNING job.id"""

# finish_many: a job not among the returned ones had lost its lease; the caller drops the result.
FINISH_MANY = """
UPDATE job SET status = v.column3, result = v.column4, error = v.column5,
               finished_at = CAST(v.column6 AS DOUBLE PRECISION), lease_token = NULL, lease_expires = NULL,
               sealed = CASE WHEN webhook = '' THEN '' ELSE sealed END,
               webhook_state = CASE WHEN webhook = '' THEN 'none' ELSE 'due' END
  FROM (VALUES {(:id, :token, :status, :result, :error, :now)}) AS v
 WHERE job.id = v.column1 AND job.lease_token = v.column2 RETURNING job.id"""

# requeue: the worker is lost or refused it; the job waits again, and its next run has its own start. No row: its
# caller wants it no more.
REQUEUE = """
UPDATE job SET status = 'queued', lease_token = NULL, lease_expires = NULL, worker_id = NULL, worker_url = NULL,
               request_idx = NULL, started_at = NULL, lost_workers = :lost_workers, not_before = :not_before
 WHERE id = :id AND lease_token = :token AND cancel_requested = 0"""

# lost_workers: who did not bring it back so far.
LOST_WORKERS = "SELECT lost_workers FROM job WHERE id = :id AND lease_token = :token"

# end_waiting_many: cancelled or failed before any worker had them; returned are those that did wait.
END_WAITING_MANY = """
UPDATE job SET status = v.column2, error = v.column3, finished_at = CAST(v.column4 AS DOUBLE PRECISION),
               sealed = CASE WHEN webhook = '' THEN '' ELSE sealed END,
               webhook_state = CASE WHEN webhook = '' THEN 'none' ELSE 'due' END
  FROM (VALUES {(:id, :status, :error, :now)}) AS v
 WHERE job.id = v.column1 AND job.status = 'queued' RETURNING job.id"""

# ask_cancel: the holder will see it.
ASK_CANCEL = "UPDATE job SET cancel_requested = 1 WHERE id = :id AND status IN ('leased', 'running')"

# overdue: waiting past the deadline.
OVERDUE = "SELECT id FROM job WHERE status = 'queued' AND deadline_at IS NOT NULL AND deadline_at < :now LIMIT 1000"

# add_events: the next event of each job; 1 is `queued`, which is the job's own row.
ADD_EVENTS = """
INSERT INTO job_event (job_id, seq, at, kind, data)
SELECT v.column1, (SELECT coalesce(max(e.seq), 1) + 1 FROM job_event AS e WHERE e.job_id = v.column1),
       CAST(v.column2 AS DOUBLE PRECISION), v.column3, v.column4
  FROM (VALUES {(:job_id, :at, :kind, :data)}) AS v WHERE true
RETURNING job_id, seq"""

# events: what happened after one.
EVENTS = "SELECT job_id, seq, at, kind, data FROM job_event WHERE job_id = :job_id AND seq > :after ORDER BY seq"

# undelivered: final, and no outbox has its webhook.
UNDELIVERED = "SELECT id FROM job WHERE webhook_state = 'due'"

# webhook_out: the outbox of a control plane has it and is at it; lost with that control plane, it is due again.
WEBHOOK_OUT = "UPDATE job SET webhook_state = 'out' WHERE id = :id AND webhook_state = 'due'"

# webhook_ended: the receiver has it, or was given up; its secret is not needed here any more.
WEBHOOK_ENDED = "UPDATE job SET webhook_state = 'sent', sealed = '' WHERE id = :id"

# webhooks_due_again: of an endpoint whose outbox may be lost.
WEBHOOKS_DUE_AGAIN = """
UPDATE job SET webhook_state = 'due' WHERE webhook_state IN ('due', 'out') AND endpoint_id = :endpoint_id"""

# untold: whether any webhook of an endpoint is still to be told.
UNTOLD = "SELECT 1 FROM job WHERE webhook_state IN ('due', 'out') AND endpoint_id = :endpoint_id LIMIT 1"

# prune: forget finished jobs.
PRUNE_EVENTS = """
DELETE FROM job_event WHERE job_id IN (SELECT id FROM job WHERE finished_at IS NOT NULL AND finished_at < :before)"""
PRUNE_JOBS = """
DELETE FROM job WHERE finished_at IS NOT NULL AND finished_at < :before AND webhook_state NOT IN ('due', 'out')"""
