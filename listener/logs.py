"""Logs: a static event name and its fields, one line each, as logfmt or JSON, on stderr."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from listener.config import Settings

_logger = logging.getLogger("listener")

# Of one warning or error, so many in a minute; an outage or a thousand bad events fill no disk.
_AT_MOST = 5
_WINDOW_SECONDS = 60.0

# In a connection string that was given as an argument, or in the place of another setting. A port
# is no password, nor is that of our own example.
_PASSWORD = re.compile(
    r"(?<=://)([^/?@\s:]*:)(?!\d{1,5}[/\s,;]|password@host:).+(?=@)|(password\s*=\s*)(?:'(?:[^'\\]|\\.)*'|\S+)"
)
# What journald takes for the priority at the start of a line, see sd-daemon(3).
_PRIORITIES = {"debug": "<7>", "info": "<6>", "warning": "<4>", "error": "<3>"}


def log(level: int, event: str, **fields: Any) -> None:
    """Log one event, e.g. log(logging.INFO, "batch_stored", events=32, seconds=0.12)."""
    _logger.log(level, event, extra={"fields": fields})


def configure_logs(settings: Settings) -> None:
    """Send the listener's own records to stderr in the chosen format, without secrets."""
    handler = _Handler()
    handler.setFormatter(_Formatter(settings.log_format, settings.secrets()))
    _logger.handlers = [handler]
    _logger.propagate = False
    _logger.setLevel(settings.log_level.upper())


def redact(text: str, secrets: set[str]) -> str:
    """The text with every secret replaced, longest first, and what has the shape of one."""
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    return _PASSWORD.sub(r"\1\2***", text)


@dataclass
class _Repeats:
    """What came of one event with one kind of cause, since `began` in seconds of the epoch."""

    began: float
    written: int = 0
    left_out: int = 0
    last: logging.LogRecord | None = None


class _Handler(logging.StreamHandler[Any]):
    """Writes to stderr; warnings and errors that repeat, a few times a minute and with their count.

    The last of those left out is written with `repeats`, the number of the others, as soon as its
    minute is over and anything is logged, or at the end.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[tuple[str, str], _Repeats] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Called with the handler's lock held."""
        for key, seen in list(self._seen.items()):
            if not 0 <= record.created - seen.began < _WINDOW_SECONDS:
                del self._seen[key]
                self._write_left_out(seen)
        if record.levelno < logging.WARNING:
            self._write(record)
            return
        seen = self._seen.setdefault(_kind(record), _Repeats(record.created))
        if seen.written < _AT_MOST:
            seen.written += 1
            self._write(record)
        else:
            seen.left_out += 1
            seen.last = record

    def close(self) -> None:
        """Called by the interpreter at its end."""
        for seen in self._seen.values():
            self._write_left_out(seen)
        self._seen.clear()
        super().close()

    def _write_left_out(self, seen: _Repeats) -> None:
        if seen.last is not None:
            self._write(seen.last, {"repeats": seen.left_out - 1})

    def _write(self, record: logging.LogRecord, more: dict[str, Any] | None = None) -> None:
        record.fields = getattr(record, "fields", {}) | (more or {})
        # Looked up each time: a progress bar puts itself in its place.
        self.stream = sys.stderr
        super().emit(record)


def _kind(record: logging.LogRecord) -> tuple[str, str]:
    """Event and cause up to its first colon; what follows differs from one to the next."""
    cause = str(getattr(record, "fields", {}).get("cause", ""))
    return record.getMessage(), cause.partition(":")[0]


class _Formatter(logging.Formatter):
    def __init__(self, style: str, secrets: set[str]) -> None:
        super().__init__()
        self._json = style == "json"
        self._secrets = secrets
        # The journal stamps each line itself, and takes its priority from a prefix.
        self._in_journal = _is_journal()

    def format(self, record: logging.LogRecord) -> str:
        level = record.levelname.lower()
        time = (
            datetime.fromtimestamp(record.created).astimezone().isoformat(timespec="milliseconds")
        )
        fields: dict[str, Any] = {} if self._in_journal else {"time": time}
        fields |= {"level": level, "event": record.getMessage()}
        fields |= getattr(record, "fields", {})
        # Before they are quoted: a quoted secret reads differently.
        fields = {key: self._shown(value) for key, value in fields.items()}
        line = json.dumps(fields) if self._json else " ".join(map(_pair, fields.items()))
        return f"{_PRIORITIES[level] if self._in_journal else ''}{line}"

    def _shown(self, value: Any) -> Any:
        if isinstance(value, float):
            return round(value, 4)
        return value if isinstance(value, int) else redact(str(value), self._secrets)


def with_priority(text: str) -> str:
    """Each line as an error, where stderr is the journal's."""
    if not _is_journal():
        return text
    return "\n".join(_PRIORITIES["error"] + line for line in text.splitlines())


def _is_journal() -> bool:
    """Whether stderr is the journal's; a child of the service may have another stderr."""
    file = os.fstat(2)
    return os.environ.get("JOURNAL_STREAM") == f"{file.st_dev}:{file.st_ino}"


def _pair(item: tuple[str, Any]) -> str:
    key, value = item[0], str(item[1])
    is_bare = bool(value) and all(c not in ' "=' and c.isprintable() for c in value)
    return f"{key}={value if is_bare else json.dumps(value)}"
