"""What users import: `Serverless` (async) and `SyncServerless` (its blocking twin)."""
