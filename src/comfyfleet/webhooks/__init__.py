"""Tell a receiver what happened to a job: signed, kept until told, never twice under two ids.

Reading order: `envelope` (pure: body and headers), `outbox` (what is still to be told, on disk), `deliver` (the loop
and the backoff). Used by the worker's notify stage and by the control plane for durable jobs.
"""
