"""Logs: a static event name and its fields, one line each, as logfmt or JSON, on stderr."""

from __future__ import annotations

import json
import logging
import os
import sys
from datetime import datetime
from typing import Any

from listener.config import Settings

_logger = logging.getLogger("listener")


def log(level: int, event: str, **fields: Any) -> None:
    """Log one event, e.g. log(logging.INFO, "batch_stored", events=32, seconds=0.12)."""
    _logger.log(level, event, extra={"fields": fields})


def configure_logs(settings: Settings) -> None:
    """Send the listener's own records to stderr in the chosen format, without secrets."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(settings.log_format, settings.secrets()))
    _logger.handlers = [handler]
    _logger.propagate = False
    _logger.setLevel(settings.log_level.upper())


def redact(text: str, secrets: set[str]) -> str:
    """The text with every secret replaced, longest first."""
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    return text


class _Formatter(logging.Formatter):
    def __init__(self, style: str, secrets: set[str]) -> None:
        super().__init__()
        self._json = style == "json"
        self._secrets = secrets
        # journald stamps each line itself.
        self._stamped = "JOURNAL_STREAM" not in os.environ

    def format(self, record: logging.LogRecord) -> str:
        time = (
            datetime.fromtimestamp(record.created).astimezone().isoformat(timespec="milliseconds")
        )
        fields: dict[str, Any] = {"time": time} if self._stamped else {}
        fields |= {"level": record.levelname.lower(), "event": record.getMessage()}
        fields |= getattr(record, "fields", {})
        fields = {key: _short(value) for key, value in fields.items()}
        line = json.dumps(fields) if self._json else " ".join(map(_pair, fields.items()))
        return redact(line, self._secrets)


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    return value if isinstance(value, int | bool) else str(value)


def _pair(item: tuple[str, Any]) -> str:
    key, value = item[0], str(item[1])
    quoted = json.dumps(value) if not value or any(c in value for c in ' "=\n\t') else value
    return f"{key}={quoted}"
