"""On a terminal things move, in colour unless NO_COLOR; anywhere else there are plain lines."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from types import SimpleNamespace

import pytest

from listener import live
from listener.config import Settings
from listener.console import say
from listener.stop import Stop
from tests.harness import Database, Spawn, empty_folder, environment, listener, wait_until

_COLOUR = re.compile(r"\x1b\[[0-9;]*3[0-7]m")
_ESCAPE = "\x1b"


class Terminal:
    """A command whose three streams are a terminal."""

    def __init__(self, settings: Settings, *arguments: str, **variables: str) -> None:
        self._end, theirs = pty.openpty()
        plain = {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40", **variables}
        inherited = environment(settings, **plain)
        if "NO_COLOR" not in variables:
            inherited.pop("NO_COLOR", None)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "listener", *arguments],
            env=inherited,
            cwd=empty_folder(),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        self._shown = b""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                part = os.read(self._end, 65_536)
            except OSError:  # the other end is closed
                return
            self._shown += part

    def shown(self) -> str:
        """All that was ever written to it."""
        return self._shown.decode()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        os.close(self._end)


@contextmanager
def terminal(settings: Settings, *arguments: str, **variables: str) -> Iterator[Terminal]:
    opened = Terminal(settings, *arguments, **variables)
    try:
        yield opened
    finally:
        opened.close()


def test_a_watched_status_is_renewed_in_place_and_ends_with_ctrl_c(static: Database) -> None:
    """Exit 0: that is how it ends."""
    with terminal(static.settings, "status", "--watch") as watching:
        wait_until(lambda: re.search(r"pending +\x1b\S* *0|pending.* 0", watching.shown()))
        static.insert("a", "b", "c")
        wait_until(lambda: re.search(r"pending.* 3", watching.shown()))

        watching.process.send_signal(signal.SIGINT)
        code = watching.process.wait(10)

    assert code == 0
    # Up by a line, and the cursor is there again at the end.
    assert f"{_ESCAPE}[1A" in watching.shown()
    assert watching.shown().rfind(f"{_ESCAPE}[?25h") > watching.shown().rfind(f"{_ESCAPE}[?25l")


def test_no_message_commands_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """What is said may quote what a device or a writer chose."""
    say("event \x1b[2J\x9b is not known\n")

    assert capsys.readouterr().err == "event \\x1b[2J\\x9b is not known\n\n"

    say("".join(map(chr, range(160))))
    assert {char for char in capsys.readouterr().err if not char.isprintable()} == {"\t", "\n"}


@pytest.mark.parametrize(("variables", "is_coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_no_color_is_honoured(
    static: Database, variables: dict[str, str], is_coloured: bool
) -> None:
    """Where there is something to be red about."""
    static.park(*static.insert("a"))

    with terminal(static.settings, "status", "--watch", **variables) as watching:
        wait_until(lambda: "last error" in watching.shown())

    assert bool(_COLOUR.search(watching.shown())) == is_coloured


def test_a_watched_status_that_nobody_watches_is_a_block_for_each_change(
    static: Database, spawn: Spawn
) -> None:
    """Plain text, and silent while nothing happens."""
    watching = spawn(static.settings, "status", "--watch")
    watching.wait_for("last error")
    static.park(*static.insert("a"))
    watching.wait_for("parked          1")
    shown, looked = watching.output(), last_look(static)

    # It looks again each second.
    wait_until(lambda: last_look(static) - looked > timedelta(seconds=2.5))
    assert watching.output() == shown
    assert watching.end(signal.SIGINT) == 0
    assert _ESCAPE not in watching.output()


def last_look(database: Database) -> datetime:
    """When a watched status last asked the database for anything."""
    asked: datetime = database.value(
        "select max(query_start) from pg_stat_activity "
        "where datname = current_database() and application_name = 'listener-status'"
    )
    return asked


def test_to_be_looked_at_takes_no_more_than_a_quarter_of_the_databases_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where a look takes a second, the next comes three seconds later."""
    waits: list[float] = []

    class Impatient(Stop):
        def wait(self, seconds: float) -> None:
            waits.append(seconds)
            self.set()

    monkeypatch.setattr(live, "stop_on_signals", Impatient)
    clock = iter([100.0, 101.0])
    monkeypatch.setattr(live, "time", SimpleNamespace(monotonic=lambda: next(clock)))

    live.show_live(lambda: "pending 0")

    assert waits == [3.0]


def test_a_watched_status_as_json_is_an_object_for_each_change(
    static: Database, spawn: Spawn
) -> None:
    """For programs."""
    watching = spawn(static.settings, "status", "--watch", "--json")
    watching.wait_for('"pending": 0')
    static.insert("a")
    watching.wait_for('"pending": 1')
    watching.end()

    shown = [json.loads(line)["pending"] for line in watching.output().splitlines() if line]

    assert set(shown) == {0, 1}


def test_a_backfill_on_a_terminal_is_a_bar(static: Database) -> None:
    """With what is left and how fast it goes."""
    static.insert(*map(str, range(2000)))

    with terminal(static.settings, "backfill", "--all", "--work") as running:
        code = running.process.wait(60)

    assert code == 0
    assert "━" in running.shown()
    assert "events/s" in running.shown()


def test_a_terminal_that_can_not_move_its_cursor_gets_plain_lines(static: Database) -> None:
    """As a shell in an editor."""
    with terminal(static.settings, "status", "--watch", TERM="dumb") as running:
        wait_until(lambda: "last error" in running.shown())

    assert _ESCAPE not in running.shown()


def test_a_backfill_anywhere_else_is_plain_lines(static: Database) -> None:
    """Even with a terminal's settings around."""
    static.insert(*map(str, range(2000)))

    said = listener(static.settings, "backfill", "--all", "--work", TERM="xterm-256color").stderr

    assert re.search(r"^\d+ pending, \d+ events/s, ", said, re.MULTILINE)
    assert _ESCAPE not in said
    assert "━" not in said
