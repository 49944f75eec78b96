"""Hears what other processes tell through PostgreSQL: LISTEN on a connection of its own, opened again after a loss."""

from __future__ import annotations

import anyio
import psycopg
import structlog

from comfyfleet.control.store.news import CHANNEL, Hear, News, unpacked

log = structlog.get_logger()

NAME = "comfyfleet listener"
# A connection that says nothing for so long is asked whether it lives.
_ASK_EVERY_S = 20.0
_RECONNECT_S = 1.0


async def listen(url: str, teller: str, hear: Hear) -> None:
    """Until cancelled. teller: our own word, not to be heard again."""
    while True:
        try:
            opening = psycopg.AsyncConnection.connect(url, autocommit=True, connect_timeout=5, application_name=NAME)
            async with await opening as raw:
                await raw.execute(f"LISTEN {CHANNEL}")
                hear(News(is_all=True))  # whatever was said while nobody listened
                while True:
                    async for notice in raw.notifies(timeout=_ASK_EVERY_S):
                        news = unpacked(notice.payload)
                        if news.teller != teller:
                            hear(news)
                    await raw.execute("SELECT 1")
        except psycopg.OperationalError as error:
            log.warning("store.not_listening", error=str(error).strip())
        await anyio.sleep(_RECONNECT_S)
