"""Incremental parser of one HTTP/1.1 response: bytes in, body bytes out."""

from collections.abc import Iterator

_MAX_HEAD_BYTES = 2**16
_LINE_END = b"\r\n"


class ResponseError(Exception):
    """A request failed or its response is unusable; the message says why."""


class StatusError(ResponseError):
    """A whole response without success."""

    def __init__(self, status: int, excerpt: str) -> None:
        super().__init__(f"HTTP {status}: {excerpt}")
        self.status = status


class HttpResponse:
    """Parses a response from pieces of any size; does not touch sockets.

    Attributes:
        status: the status code; 0 until the head is complete.
        keeps_connection: whether the connection can be reused.
        is_complete: whether the whole body has arrived.
    """

    def __init__(self) -> None:
        self.status = 0
        self.keeps_connection = True
        self.is_complete = False
        self._is_chunked = False
        # of the body, or of the chunk and its line end; None: the body ends with the connection
        self._bytes_left: int | None = None
        self._is_trailer = False
        self._unparsed = b""  # bytes of an incomplete head or line

    @property
    def has_begun(self) -> bool:
        """Whether any byte has arrived."""
        return bool(self.status or self._unparsed)

    def feed(self, data: bytes) -> bytes:
        """Parse more bytes and return the body bytes among them.

        Raises:
            ResponseError: the bytes are not an HTTP/1.x response.
        """
        if not self.status:
            head, found, data = (self._unparsed + data).partition(2 * _LINE_END)
            if not found:
                self._unparsed = head
                if len(head) > _MAX_HEAD_BYTES:
                    raise ResponseError(f"HTTP head is longer than {_MAX_HEAD_BYTES} bytes")
                return b""
            self._unparsed = b""
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
        """The connection was closed; this completes a body without a length."""
        self.keeps_connection = False
        if self.status and not self._is_chunked and self._bytes_left is None:
            self.is_complete = True

    def _read_head(self, head: bytes) -> None:
        first, *lines = head.decode("latin-1").split("\r\n")
        version, _, rest = first.partition(" ")
        if not version.startswith("HTTP/1.") or not rest[:3].isdecimal():
            raise ResponseError(f"not an HTTP/1.1 response: {first[:80]!r}")
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
        data = self._unparsed + data
        self._unparsed = b""
        while data and not self.is_complete:
            assert self._bytes_left is not None
            if self._bytes_left:
                # the line end after a chunk is not part of the body
                yield data[: max(0, self._bytes_left - len(_LINE_END))]
                taken = min(len(data), self._bytes_left)
                self._bytes_left -= taken
                data = data[taken:]
                continue
            line, found, after = data.partition(_LINE_END)
            if not found:
                self._unparsed = data
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
            raise ResponseError(f"not a chunk size: {line[:80]!r}") from None
        if size:
            self._bytes_left = size + len(_LINE_END)
        else:
            self._is_trailer = True
