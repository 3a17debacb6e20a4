"""The frame of one HTTP/1.1 answer, taken off its bytes as they come."""

from collections.abc import Iterator

_MOST_HEAD_BYTES = 2**16
_LINE_END = b"\r\n"


class AnswerError(Exception):
    """A request without the answer that it should have; the message says why."""


class HttpAnswer:
    """Bytes in, the body's bytes out, however they were cut; it knows no sockets.

    Attributes:
        status: the status code; 0 before the head has come.
        keeps_connection: whether another request may follow on the connection.
        is_complete: whether the whole body has come.
    """

    def __init__(self) -> None:
        self.status = 0
        self.keeps_connection = True
        self.is_complete = False
        self._is_chunked = False
        # of the body, or of the chunk and the line end after it; None: until the connection ends
        self._bytes_left: int | None = None
        self._is_trailer = False
        self._rest = b""  # what is no whole line yet

    @property
    def has_begun(self) -> bool:
        """Whether a byte has come."""
        return bool(self.status or self._rest)

    def feed(self, data: bytes) -> bytes:
        """Return what of the body is among these bytes.

        Raises:
            AnswerError: this is no HTTP/1.1.
        """
        if not self.status:
            head, found, data = (self._rest + data).partition(2 * _LINE_END)
            if not found:
                self._rest = head
                if len(head) > _MOST_HEAD_BYTES:
                    raise AnswerError("an HTTP head without an end")
                return b""
            self._rest = b""
            self._read_head(head)
        if self._is_chunked:
            return b"".join(self._chunks(data))
        if self._bytes_left is None:
            return data
        body = data[: self._bytes_left]
        self._bytes_left -= len(body)
        self.is_complete = not self._bytes_left
        return body

    def feed_end(self) -> None:
        """The connection was closed, which ends a body of no announced length."""
        self.keeps_connection = False
        if self.status and not self._is_chunked and self._bytes_left is None:
            self.is_complete = True

    def _read_head(self, head: bytes) -> None:
        first, *lines = head.decode("latin-1").split("\r\n")
        version, _, rest = first.partition(" ")
        if not version.startswith("HTTP/1.") or not rest[:3].isdecimal():
            raise AnswerError(f"no HTTP/1.1 answer: {first[:80]!r}")
        self.status = int(rest[:3])
        fields = {}
        for line in lines:
            name, _, value = line.partition(":")
            fields[name.strip().lower()] = value.strip().lower()
        self._is_chunked = "chunked" in fields.get("transfer-encoding", "")
        length = fields.get("content-length", "")
        if self._is_chunked:
            self._bytes_left = 0
        elif length.isdecimal():
            self._bytes_left = int(length)
        is_old = version == "HTTP/1.0"
        self.keeps_connection = fields.get("connection", "close" if is_old else "") != "close"

    def _chunks(self, data: bytes) -> Iterator[bytes]:
        data = self._rest + data
        self._rest = b""
        while data and not self.is_complete:
            assert self._bytes_left is not None
            if self._bytes_left:
                # the line end after a chunk is no part of it
                yield data[: max(0, self._bytes_left - len(_LINE_END))]
                taken = min(len(data), self._bytes_left)
                self._bytes_left -= taken
                data = data[taken:]
                continue
            line, found, after = data.partition(_LINE_END)
            if not found:
                self._rest = data
                return
            data = after
            if self._is_trailer:
                self.is_complete = not line
            else:
                self._begin_chunk(line)

    def _begin_chunk(self, line: bytes) -> None:
        try:
            size = int(line.partition(b";")[0], 16)
        except ValueError:
            raise AnswerError(f"no size of a chunk: {line[:80]!r}") from None
        if size:
            self._bytes_left = size + len(_LINE_END)
        else:
            self._is_trailer = True
