"""The log's formats: text, or one JSON object per line."""

from __future__ import annotations

import logging
import re
from datetime import UTC, datetime

import orjson

from cellserve.service.settings import LogFormat

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def configure(form: LogFormat) -> None:
    """Configures logging to stderr in a format."""
    handler = logging.StreamHandler()
    handler.setFormatter(formatter(form))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def formatter(form: LogFormat) -> logging.Formatter:
    """Returns a formatter of messages and their fields (`extra={"fields": {...}}`)."""
    return _Json() if form == "json" else _Text("%(levelname)s: %(message)s")


class _Text(logging.Formatter):
    """The message, followed by its request id and owner as `name=value`."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", {})
        more = (f" {name}={value}" for name, value in fields.items() if name in ("request_id", "owner") and value)
        message = super().formatMessage(record) + "".join(more)
        # A line is a line, and steers no terminal, whatever is told of a model's file, say.
        return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), message)


class _Json(logging.Formatter):
    """An object: time (UTC), level, logger, message and the message's fields."""

    def format(self, record: logging.LogRecord) -> str:
        document = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            document["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(document, default=str).decode()
