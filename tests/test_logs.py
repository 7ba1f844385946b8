"""A log line is for whoever reads the journal: one a batch, no flood, no secret."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from listener.config import Settings
from listener.logs import configure_logs, log
from tests.harness import Database, empty_folder, environment, listener

URL = "postgresql://u:p%22w@h/db"


@pytest.fixture(autouse=True)
def logger() -> Iterator[logging.Logger]:
    """The listener's own, put back as it was."""
    logger = logging.getLogger("listener")
    handlers, level = logger.handlers, logger.level
    yield logger
    for handler in logger.handlers:
        handler.close()
    logger.handlers, logger.propagate = handlers, True
    logger.setLevel(level)


def written(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def repeats(lines: list[dict[str, Any]]) -> int:
    """How many records the lines stand for."""
    return sum(1 + int(line.get("repeats", 0)) for line in lines)


def test_a_flood_of_one_error_is_a_few_lines_and_a_count(
    logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    """A thousand parked events; none is silently lost."""
    configure_logs(Settings(log_format="json"))

    for number in range(1000):
        log(logging.ERROR, "event_parked", event_id=number, cause=f"DataError: row {number}")
    logger.handlers[0].close()

    lines = written(capsys)
    assert len(lines) == 6
    assert repeats(lines) == 1000
    assert lines[-1]["event_id"] == 999


def test_what_was_left_out_is_told_with_the_next_line_of_any_kind(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once its minute is over; and then it may be written again."""
    configure_logs(Settings(log_format="json"))
    make = logging.getLogRecordFactory()
    now = 1_000.0

    def at(*arguments: Any, **named: Any) -> logging.LogRecord:
        record: logging.LogRecord = make(*arguments, **named)
        record.created = now
        return record

    monkeypatch.setattr(logging, "_logRecordFactory", at)
    for _ in range(20):
        log(logging.WARNING, "connection_lost", cause="no connection to Postgres: refused")
    now += 61
    log(logging.INFO, "batch_stored", events=1)
    log(logging.WARNING, "connection_lost", cause="no connection to Postgres: refused")

    lines = written(capsys)
    assert [line["event"] for line in lines] == ["connection_lost"] * 6 + [
        "batch_stored",
        "connection_lost",
    ]
    assert repeats(lines) == 22


def test_a_clock_that_is_set_back_silences_nothing(
    logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not until the clock is where it was."""
    configure_logs(Settings(log_format="json"))
    said = {"levelno": logging.WARNING, "levelname": "WARNING", "msg": "connection_lost"}

    for created in [10_000.0] * 7 + [1_000.0]:
        logger.handle(logging.makeLogRecord({**said, "created": created}))

    lines = written(capsys)
    assert len(lines) == 7
    assert repeats(lines) == 8


def test_other_events_and_causes_are_not_held_back(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nor is what is no warning: one line a batch."""
    configure_logs(Settings(log_format="json"))

    for _ in range(20):
        log(logging.WARNING, "event_failed", cause="DataError: a")
        log(logging.INFO, "batch_stored", events=1)
    log(logging.WARNING, "event_failed", cause="ValueError: a")
    log(logging.ERROR, "event_parked", cause="DataError: a")

    events = [line["event"] for line in written(capsys)]
    assert events.count("event_failed") == 5 + 1
    assert events.count("event_parked") == 1
    assert events.count("batch_stored") == 20


@pytest.mark.parametrize("style", ["logfmt", "json"])
def test_a_line_is_one_line_whatever_is_in_it(
    capsys: pytest.CaptureFixture[str], style: str
) -> None:
    """Also no escape sequence reaches a terminal, and no secret in whichever quotes."""
    configure_logs(Settings(log_format=style, database_url=URL))

    log(logging.WARNING, "event_failed", cause='a\r\nb \x1b[31m "p"w" p%22w')

    (line,) = capsys.readouterr().err.splitlines()
    assert "\x1b" not in line
    assert 'p"w' not in line.replace("\\", "")
    assert "p%22w" not in line


def _in_journal(command: list[str], variables: Mapping[str, str]) -> list[str]:
    """What a program writes to stderr, where that is what JOURNAL_STREAM names."""
    reading, writing = os.pipe()
    file = os.fstat(writing)
    variables = {**variables, "JOURNAL_STREAM": f"{file.st_dev}:{file.st_ino}"}
    subprocess.run(command, env=variables, stderr=writing, cwd=empty_folder(), check=False)
    os.close(writing)
    with os.fdopen(reading) as journal:
        return journal.read().splitlines()


_LOG_ONCE = (
    "import logging\nfrom listener.config import Settings\n"
    "from listener.logs import configure_logs, log\n"
    "configure_logs(Settings(log_level='debug'))\n"
    "for level in (10, 20, 30, 40): log(level, 'said', a=1)"
)


def test_in_the_journal_a_line_has_its_priority_and_no_time() -> None:
    """Anywhere else it has the time."""
    command = [sys.executable, "-c", _LOG_ONCE]

    in_journal = _in_journal(command, os.environ)
    elsewhere = subprocess.run(command, capture_output=True, text=True, check=True)

    assert in_journal == [
        "<7>level=debug event=said a=1",
        "<6>level=info event=said a=1",
        "<4>level=warning event=said a=1",
        "<3>level=error event=said a=1",
    ]
    assert all(re.match(r"time=\S+ level=", line) for line in elsewhere.stderr.splitlines())


def test_in_the_journal_the_reason_for_an_end_is_an_error() -> None:
    """Or whoever asks the journal for what went wrong would not see it."""
    settings = Settings(database_url="nonsense")

    (line,) = _in_journal([sys.executable, "-m", "listener", "run"], environment(settings))

    assert line.startswith("<3>listener: DATABASE_URL is not a connection string")


def test_a_service_writes_one_line_a_batch(static: Database) -> None:
    """What it stored, and how fast."""
    static.insert("a", "b", "c")

    said = listener(static.settings, "run", "--once").stderr

    assert len(re.findall(r"event=batch_stored events=3 ", said)) == 1
