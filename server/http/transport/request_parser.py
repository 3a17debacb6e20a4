"""Parses HTTP/1 requests with httptools; limits URLs and headers, and ignores upgrade offers."""

from typing import NamedTuple, Protocol

import httptools

MAX_URL_BYTES = 8192
# the cost of a header besides its bytes, as in HTTP/2
_HEADER_BYTES = 32


class RefusedRequest(Exception):
    """The request is refused before the application sees it; ``status`` is that of the answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class RequestHead(NamedTuple):
    """A request without its body; the names of headers are in lower case."""

    method: str
    url: bytes
    headers: list[tuple[bytes, bytes]]
    is_http_1_1: bool
    keep_alive: bool


class RequestHandler(Protocol):
    """Gets the parts of each request in order."""

    def head_began(self) -> None: ...
    def head_ended(self, head: RequestHead) -> None: ...
    def body_arrived(self, data: bytes) -> None: ...
    def body_ended(self) -> None: ...


class RequestParser:
    """Feeds a handler with the requests of one connection.

    Attributes:
        is_in_head: whether a request's head has begun and not ended.
    """

    def __init__(self, handler: RequestHandler, max_head_bytes: int) -> None:
        self.is_in_head = False
        self._handler = handler
        self._max_head_bytes = max_head_bytes
        self._url, self._headers = b"", list[tuple[bytes, bytes]]()
        self._num_head = 0  # bytes of the head and the trailers
        self._num_silent = 0  # bytes since httptools last reported something
        self._parser = self._new_parser()

    def feed(self, data: bytes) -> None:
        """Parse the next bytes.

        Raises:
            RefusedRequest: the request is not valid or too large; the parser is of no more use.
        """
        self._num_silent += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            self.feed(self._without_offer() + data[offer.args[0] :])
        except httptools.HttpParserError as error:
            # an exception in a callback is the context of httptools' exception
            if isinstance(error.__context__, RefusedRequest):
                raise error.__context__ from None
            raise RefusedRequest(400, f"not a valid HTTP/1 request: {error}") from None
        if self._num_silent > self._max_head_bytes:
            raise RefusedRequest(431, "a header or trailer is too long")

    def on_message_begin(self) -> None:
        self._url, self._headers = b"", []
        self._num_head = 0
        self.is_in_head = True
        self._handler.head_began()

    def on_url(self, url: bytes) -> None:
        self._url += url
        if len(self._url) > MAX_URL_BYTES:
            raise RefusedRequest(414, f"the URL is longer than {MAX_URL_BYTES} bytes")
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + _HEADER_BYTES)
        if self.is_in_head:  # else it is a trailer
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self._num_silent = 0
        self.is_in_head = False
        if self._parser.should_upgrade():
            return
        head = RequestHead(
            method=self._parser.get_method().decode("ascii"),
            url=self._url,
            headers=self._headers,
            is_http_1_1=self._parser.get_http_version() == "1.1",
            keep_alive=self._parser.should_keep_alive(),
        )
        self._handler.head_ended(head)

    def on_body(self, body: bytes) -> None:
        self._num_silent = 0
        self._handler.body_arrived(body)

    def on_message_complete(self) -> None:
        self._num_silent = 0
        if not self._parser.should_upgrade():
            self._handler.body_ended()

    def _without_offer(self) -> bytes:
        """The head of a request that offers an upgrade, to HTTP/2 for example, without the offer.

        httptools has skipped the body of such a request, so a new parser reads it again.
        """
        method = self._parser.get_method()
        if method == b"CONNECT":
            raise RefusedRequest(405, "CONNECT is not supported")
        self._parser = self._new_parser()
        kept = [header for header in self._headers if header[0] != b"upgrade"]
        lines = [b"%b %b HTTP/1.1\r\n" % (method, self._url), *(b"%b: %b\r\n" % h for h in kept)]
        return b"".join(lines) + b"\r\n"

    def _new_parser(self) -> httptools.HttpRequestParser:
        parser = httptools.HttpRequestParser(self)
        # what follows a request with "Connection: close" is ignored, and is no error
        parser.set_dangerous_leniencies(lenient_data_after_close=True)
        return parser

    def _count(self, size: int) -> None:
        self._num_silent = 0
        self._num_head += size
        if self._num_head > self._max_head_bytes:
            raise RefusedRequest(431, f"the headers exceed {self._max_head_bytes} bytes")
