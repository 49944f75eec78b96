"""An HTTP server, a thread a connection, that takes a crowd which comes at once.

The standard one lets five connections wait to be accepted. Who comes beyond them waits for TCP's own repeats, each
twice as long as the one before: a test of five hundred callers takes seconds, or minutes, as it happens.
"""

from __future__ import annotations

from http.server import ThreadingHTTPServer


class CrowdServer(ThreadingHTTPServer):
    request_queue_size = 2048
