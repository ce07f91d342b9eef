"""The log: lines for people, or one JSON object a line."""

from __future__ import annotations

import logging
from datetime import UTC, datetime

import orjson

from cellserve.service.settings import LogFormat


def configure(form: LogFormat) -> None:
    """Sends what is logged to stderr, one line a message in the form that is wanted."""
    handler = logging.StreamHandler()
    handler.setFormatter(formatter(form))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def formatter(form: LogFormat) -> logging.Formatter:
    """Gives what makes a line of a message and the members that belong to it (`extra={"fields": {...}}`)."""
    return _Json() if form == "json" else _Text("%(levelname)s: %(message)s")


class _Text(logging.Formatter):
    """A message and the members that belong to it, `name=value`."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        told = getattr(record, "fields", {})
        more = (f" {name}={value}" for name, value in told.items() if name in ("request_id", "owner") and value)
        return super().formatMessage(record) + "".join(more)


class _Json(logging.Formatter):
    """A message and the members that belong to it as an object: time (UTC), level, logger, message and those."""

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
