"""Log lines of both processes, as text or as JSON objects."""

import json
import logging
from datetime import UTC, datetime
from typing import Any

from server.request_id import current_request_id

# messages to the person who started the server: as text they have no prefix
_PLAIN = "memplus"


def set_up_logs(log_format: str) -> None:
    """Write all logs of this process to stderr as ``text`` or ``json``, from level INFO."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(True)


def say(line: str, level: int = logging.INFO) -> None:
    """Log a line to the person who started the server."""
    logging.getLogger(_PLAIN).log(level, line)


class TextFormatter(logging.Formatter):
    """Level, logger and message, then the id of the HTTP request that the line is about."""

    def __init__(self) -> None:
        super().__init__("%(levelname)s: %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line without a traceback."""
        if record.name == _PLAIN:
            return record.message
        request_id = current_request_id()
        line = super().formatMessage(record)
        return f"{line} [{request_id}]" if request_id else line


class JsonFormatter(logging.Formatter):
    """One JSON object per record, with the fields of its ``extra={"fields": ...}``."""

    def format(self, record: logging.LogRecord) -> str:
        """The record on one line."""
        values: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "process": record.processName,
            "message": record.getMessage(),
        }
        request_id = current_request_id()
        if request_id:
            values["request_id"] = request_id
        if record.exc_info:
            values["traceback"] = self.formatException(record.exc_info)
        return json.dumps(values | getattr(record, "fields", {}))
