"""The rest of a body that was answered before it was read: an upload refused half-way, or before it began.

Without this the server would read on for as long as the client sends. Closing at once is no better: the
client, still writing, would see a broken connection instead of the answer. So the answer goes out whole, with
`Connection: close`, and the rest is dropped for a moment before the connection is (nginx: lingering close).
"""

import asyncio

from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

# A client that reads at all has seen the answer by then; one that does not gets no more of our time.
LINGER_SECONDS = 2.0
LINGER_BYTES = 64 * 1024 * 1024


class UnreadBody:
    """One request's two directions, which knows whether the body was read to its end."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        self._receive = receive
        self._send = send
        self._is_unread = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
        # Such a client sends nothing before it is asked to, and it will not be asked now.
        self._waits_to_be_asked = headers.get("expect", "").lower() == "100-continue"
        self._lingers = False

    async def receive(self) -> Message:
        """Return the next message from the client."""
        self._waits_to_be_asked = False
        message = await self._receive()
        if message["type"] != "http.request" or not message.get("more_body", False):
            self._is_unread = False
        return message

    async def send(self, message: Message) -> None:
        """Send a message to the client; the last one only after lingering, when its body is unread."""
        if message["type"] == "http.response.start" and self._is_unread:
            self._lingers = not self._waits_to_be_asked
            message["headers"] = [*message.get("headers", ()), (b"connection", b"close")]
        is_last = message["type"] == "http.response.body" and not message.get("more_body", False)
        if not (is_last and self._lingers):
            await self._send(message)
            return
        await self._send({**message, "more_body": True})
        await self._drop_rest()
        await self._send({"type": "http.response.body", "body": b""})

    async def _drop_rest(self) -> None:
        dropped = 0
        try:
            async with asyncio.timeout(LINGER_SECONDS):
                while self._is_unread and dropped < LINGER_BYTES:
                    message = await self.receive()
                    dropped += len(message.get("body", b""))
        except TimeoutError:
            pass
