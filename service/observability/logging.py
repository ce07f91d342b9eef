"""The log's formats: text, or one JSON object per line."""

from __future__ import annotations

import logging
from datetime import UTC, datetime

import orjson

from cellserve.service.errors import printable
from cellserve.service.settings import LogFormat


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
        return printable(super().formatMessage(record) + "".join(more))


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
