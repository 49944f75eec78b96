"""The journal's statements, by hand. One row a job, from its acceptance to the end of its retention.

A row is either open (`status` is "accepted") or final. Where an open job was in between is asked of the engine at a
restart, not remembered: a remembered answer could only be older than the engine's.
"""

from __future__ import annotations

SCHEMA = """
CREATE TABLE IF NOT EXISTS job (
    uid INTEGER PRIMARY KEY,
    id TEXT NOT NULL,
    scope TEXT NOT NULL,
    key TEXT NOT NULL,
    folder TEXT NOT NULL,
    fingerprint TEXT NOT NULL,
    accepted_at REAL NOT NULL,
    prompt_id TEXT NOT NULL,
    earlier_faults TEXT NOT NULL DEFAULT '',
    abandonable INTEGER NOT NULL,
    request BLOB,
    status TEXT NOT NULL,
    http_status INTEGER,
    retry_after_s REAL,
    finished_at REAL,
    result BLOB,
    events BLOB,
    UNIQUE (scope, key)
);
CREATE INDEX IF NOT EXISTS job_by_id ON job (id);
-- Nearly every folder is named like its job and found by that; only the others are listed here.
CREATE INDEX IF NOT EXISTS job_by_other_folder ON job (folder) WHERE folder <> id;
CREATE INDEX IF NOT EXISTS job_by_end ON job (finished_at) WHERE finished_at IS NOT NULL;
CREATE TABLE IF NOT EXISTS outlived (folder TEXT PRIMARY KEY, until REAL NOT NULL);
CREATE TABLE IF NOT EXISTS learned (name TEXT PRIMARY KEY, data BLOB NOT NULL);
"""

# A key whose last run ended in a way that a retry can mend is free again: the new job replaces the old row.
ACCEPT = """
INSERT OR REPLACE INTO job
    (id, scope, key, folder, fingerprint, accepted_at, prompt_id, earlier_faults, abandonable, request, status)
VALUES (:id, :scope, :key, :folder, :fingerprint, :accepted_at, :prompt_id, '', :abandonable, :request, 'accepted')
"""

# Another prompt for the same job, written before it is sent.
ATTEMPT = """
UPDATE job SET prompt_id = :prompt_id, earlier_faults = :earlier_faults
 WHERE scope = :scope AND key = :key AND status = 'accepted'
"""

KEEP = "UPDATE job SET abandonable = 0 WHERE scope = :scope AND key = :key"

# Exactly once: a row that is final stays as it is. The request is not needed any more, and secrets go with it.
FINISH = """
UPDATE job SET status = :status, http_status = :http_status, retry_after_s = :retry_after_s,
       finished_at = :finished_at, result = :result, events = :events, request = NULL
 WHERE scope = :scope AND key = :key AND status = 'accepted'
"""

OPEN_JOBS = "SELECT * FROM job WHERE status = 'accepted' ORDER BY uid"
BY_KEY = "SELECT * FROM job WHERE scope = ? AND key = ?"
BY_ID = "SELECT * FROM job WHERE id = ? AND scope = ? ORDER BY uid DESC LIMIT 1"
KNOWS_FOLDER = """
SELECT 1 FROM job WHERE id = :folder AND folder = id AND scope IS NOT :but_scope
UNION ALL
SELECT 1 FROM job WHERE folder = :folder AND folder <> id AND scope IS NOT :but_scope
 LIMIT 1
"""
FOLDER_OPEN = """
SELECT 1 FROM job WHERE id = :folder AND folder = id AND status = 'accepted'
UNION ALL
SELECT 1 FROM job WHERE folder = :folder AND folder <> id AND status = 'accepted'
 LIMIT 1
"""
KEPT_FOLDERS = "SELECT folder FROM job"
# Results whose time is over, some at a time; their folders stay on the list until no link leads to them.
EXPIRED = "SELECT uid, folder, finished_at, result FROM job WHERE finished_at < ? ORDER BY finished_at LIMIT 200"
FORGET = "DELETE FROM job WHERE uid = ?"
OUTLIVE = "INSERT OR REPLACE INTO outlived (folder, until) VALUES (?, ?)"
OUTLIVED = "SELECT folder FROM outlived WHERE until <= ? ORDER BY until LIMIT 200"
FOLDERS_GONE = "DELETE FROM outlived WHERE folder IN (SELECT value FROM json_each(?))"
SAVE_LEARNED = "INSERT OR REPLACE INTO learned (name, data) VALUES ('durations', ?)"
LOAD_LEARNED = "SELECT data FROM learned WHERE name = 'durations'"
