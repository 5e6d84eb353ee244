"""HTTP as uvicorn speaks it, with an end to a client's time: by itself uvicorn waits for ever.

A client that sends half a request and no more would hold its connection, and many would hold all that a
process may have. Here the head of a request must be there READ_SECONDS after the connection or the head's
beginning. In app.py, the body must be there as long after the head.
"""

import asyncio
import os

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

READ_SECONDS = float(os.environ.get("READ_SECONDS", 10))
if not 0 < READ_SECONDS <= 3600:
    raise ValueError(f"READ_SECONDS must be above 0 and at most 3600, got {READ_SECONDS:g}")

MAX_HEAD = 64 * 1024  # bytes; uvicorn has no limit


class Protocol(HttpToolsProtocol):
    head_bytes = 0
    deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.expect_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:  # no request is under way: a part of a head
            self.head_bytes += len(data)
            if self.head_bytes > MAX_HEAD:
                self.refuse(b"431 Request Header Fields Too Large")
            elif self.deadline is None:
                self.expect_head()

    def expect_head(self) -> None:
        self.deadline = self.loop.call_later(READ_SECONDS, self.refuse, b"408 Request Timeout")

    def on_headers_complete(self) -> None:
        if self.deadline is not None:
            self.deadline.cancel()
        self.head_bytes, self.deadline = 0, None
        super().on_headers_complete()

    def refuse(self, status: bytes) -> None:
        if self not in self.connections or self.transport.is_closing():
            return  # lost by now, or a WebSocket's
        if self.head_bytes:  # browsers connect before they have a question, and expect no answer then
            self.transport.write(b"HTTP/1.1 %s\r\nconnection: close\r\ncontent-length: 0\r\n\r\n" % status)
        self.transport.close()
