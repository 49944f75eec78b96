"""What users import: `Serverless` (async) and `SyncServerless`, its blocking twin.

Reading order: serverless, endpoint, attempts (what to do after each try), request, transport, discovery, blocking.
"""

from __future__ import annotations

from comfyfleet.client.blocking import SyncEndpoint, SyncEventStream, SyncServerless, SyncSession
from comfyfleet.client.endpoint import Endpoint, EndpointWorker
from comfyfleet.client.request import RequestOutcome, RequestState, ServerlessRequest
from comfyfleet.client.serverless import Serverless
from comfyfleet.client.session import Session
from comfyfleet.client.stream import EventStream

__all__ = [
    "Endpoint",
    "EndpointWorker",
    "EventStream",
    "RequestOutcome",
    "RequestState",
    "Serverless",
    "ServerlessRequest",
    "Session",
    "SyncEndpoint",
    "SyncEventStream",
    "SyncServerless",
    "SyncSession",
]
