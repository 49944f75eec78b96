"""The one way out: every address that a request names is reached through here, and only if it is public or allowed.

For URL inputs, webhooks and request-named S3 endpoints. Not for engines, the control plane or what the operator
configured. Reading order: `addresses` (pure: may we go there), `resolver` (resolve, check, pin), `fetcher` (download
and post), `body` (bounded decompression), `tunnel` (the same rules for clients that connect by themselves).
"""
