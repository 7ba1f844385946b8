"""What the service tells systemd, and what it doesn't say when it stands still."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from listener import notify_systemd
from listener.config import Settings
from listener.database import Connection
from listener.embedded import Server
from listener.pipeline import Pipeline
from listener.status import read_backlog
from listener.wakeup import Wakeup
from tests.harness import Database, TinyEmbedder, environment, is_asleep, serving, wait_until
from tests.proxy import proxied

_FED = "WATCHDOG=1"


@dataclass
class Systemd:
    """The receiving end of the socket."""

    channel: socket.socket
    received: list[str] = field(default_factory=list)

    def messages(self) -> list[str]:
        """All so far."""
        while True:
            try:
                self.received.append(self.channel.recv(4096).decode())
            except BlockingIOError:
                return self.received

    def is_fed(self, times: int = 3) -> bool:
        """Whether the watchdog was fed this often since `forget`."""
        return self.messages().count(_FED) >= times

    def forget(self) -> None:
        self.messages().clear()

    def status(self) -> str:
        """The last line for `systemctl status`."""
        lines = [text.partition("STATUS=")[2] for text in self.messages() if "STATUS=" in text]
        return lines[-1] if lines else ""


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Systemd]:
    """A watchdog of two seconds, which is fed every 0.4 s at most."""
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(path)
        channel.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", path)
        monkeypatch.setenv("WATCHDOG_USEC", "2000000")
        monkeypatch.setattr(notify_systemd, "_next_feed", 0.0)
        yield Systemd(channel)


def test_the_service_is_ready_once_it_listens(
    database: Database, systemd: Systemd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not when it connects."""
    listen, sent_before = Wakeup.listen, []

    def listening(wakeup: Wakeup, work: Connection) -> bool:
        arrived = listen(wakeup, work)
        sent_before.extend(systemd.messages())
        return arrived

    monkeypatch.setattr(Wakeup, "listen", listening)
    with serving(database):
        wait_until(lambda: "READY=1" in systemd.messages())

    assert "STATUS=connecting to Postgres" in sent_before
    assert "READY=1" not in sent_before


def test_a_service_asleep_feeds_the_watchdog(database: Database, systemd: Systemd) -> None:
    """Its beat is the progress of a loop that has nothing to do."""
    with serving(database):
        wait_until(lambda: is_asleep(database))
        systemd.forget()

        wait_until(systemd.is_fed)


def test_a_long_encode_feeds_the_watchdog(database: Database, systemd: Systemd) -> None:
    """One that takes too long is found by ENCODE_SECONDS."""
    embedder = TinyEmbedder()
    embedder.may_run.clear()
    with serving(database, embedder):
        database.insert("a")
        wait_until(lambda: database.leased() == 1)
        systemd.forget()

        wait_until(systemd.is_fed)


def test_a_database_that_is_away_is_no_hang(
    server: Server, database: Database, systemd: Systemd
) -> None:
    """The watchdog is fed while the service tries to connect."""
    assert server.port is not None
    with proxied(server.port) as proxy, serving(database.through(proxy.port)):
        wait_until(lambda: is_asleep(database))
        proxy.refuses = True
        proxy.reset()
        wait_until(lambda: systemd.status() == "connecting to Postgres")
        systemd.forget()

        wait_until(systemd.is_fed)

        proxy.refuses = False
        wait_until(lambda: systemd.status() == "backlog 0 events, lag 0.0 s")


def test_a_model_that_can_not_run_is_no_hang(database: Database, systemd: Systemd) -> None:
    """The watchdog is fed while the service waits to try again, and the status says so."""
    with serving(database.with_settings(poll_seconds=60.0), TinyEmbedder(is_broken=True)):
        database.insert("a")
        wait_until(lambda: systemd.status().startswith("the model can't run"))
        systemd.forget()

        wait_until(systemd.is_fed)


def test_a_loop_that_stands_still_lets_the_watchdog_starve(
    database: Database, systemd: Systemd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but the loop feeds it, though other threads go on."""
    go_on, stands = threading.Event(), threading.Event()
    drain = Pipeline.drain

    def stand_still(*arguments: Any) -> int:
        stands.set()
        go_on.wait()
        return drain(*arguments)

    with serving(database):
        wait_until(lambda: is_asleep(database))
        monkeypatch.setattr(Pipeline, "drain", stand_still)
        database.insert("a")
        assert stands.wait(20)
        systemd.forget()

        # Longer than any time between two meals, as above.
        threading.Event().wait(3.0)
        starved = systemd.messages() == []

        go_on.set()
    assert starved


def test_the_status_has_backlog_and_lag(
    database: Database, systemd: Systemd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all workers together, and of what waits for its turn to be tried again."""
    monkeypatch.setattr("listener.service._STATUS_SECONDS", 0.0)
    with serving(database.with_settings(retry_seconds=3000.0)):
        database.insert("a", "raise")

        wait_until(lambda: systemd.status().startswith("backlog 1 events, lag "))

        database.rows("update listener.queue set queued_at = now() - interval '500 seconds'")
        wait_until(lambda: systemd.status().startswith("backlog 1 events, lag 50"))


def test_an_event_that_is_parked_is_no_backlog(database: Database) -> None:
    """Nobody works on it, and its lag would grow for ever."""
    database.park(*database.insert("a"))

    assert read_backlog(database.conn) == "backlog 0 events, lag 0.0 s"


def test_a_backlog_is_of_events_and_its_lag_that_of_the_oldest(database: Database) -> None:
    """However often one changed."""
    database.insert("a")
    database.rows("update listener.change set changed_at = now() - interval '500 seconds'")
    database.rows("update public.iot_events set message = 'b'")
    database.insert("c")

    assert read_backlog(database.conn).startswith("backlog 2 events, lag 50")


def test_a_large_backlog_is_not_counted_to_its_end(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service asks again and again, so that the question must stay cheap."""
    from listener import status

    monkeypatch.setattr(status, "_COUNTED", 10)
    database.insert(*map(str, range(11)))

    assert status.read_backlog(database.conn).startswith("backlog over 10 events, lag over ")
    monkeypatch.setattr(status, "_COUNTED", 100)
    assert status.read_backlog(database.conn).startswith("backlog 11 events, lag ")


def test_the_watchdog_is_fed_at_a_fifth_of_its_time(
    systemd: Systemd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No later, or it bites; no sooner, because each message wakes systemd, too."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(notify_systemd, "time", SimpleNamespace(monotonic=lambda: clock.now))
    for tenths in range(20):
        clock.now = tenths / 10
        notify_systemd.alive()

    assert systemd.messages() == [_FED] * 5


def test_a_stop_is_announced(systemd: Systemd) -> None:
    """STOPPING, and what the stop waits for."""
    notify_systemd.stopping()

    assert systemd.messages() == ["STOPPING=1\nSTATUS=finishing the batch in hand"]


def test_without_systemd_nothing_is_asked_and_nothing_sent(
    database: Database, systemd: Systemd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody would read it."""
    monkeypatch.delenv("NOTIFY_SOCKET")
    monkeypatch.setattr("listener.service.read_backlog", None)
    with serving(database):
        database.insert("a")
        database.wait_for_rest()

    assert systemd.messages() == []


def test_a_systemd_that_does_not_listen_ends_no_service(
    database: Database, systemd: Systemd, caplog: pytest.LogCaptureFixture
) -> None:
    """While it starts anew, say; the log tells."""
    systemd.channel.close()
    with serving(database):
        database.insert("a")
        database.wait_for_rest()

    assert "systemd_does_not_listen" in caplog.messages


def test_a_systemd_that_does_not_read_holds_up_no_service(
    database: Database,
    systemd: Systemd,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its queue of messages is full; what can't be sent soon is not sent."""
    monkeypatch.setattr(notify_systemd, "_SEND_SECONDS", 0.01)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.connect(systemd.channel.getsockname())
        other.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                other.send(b"x")

    with serving(database):
        database.insert("a")
        database.wait_for_rest()

    assert "systemd_does_not_listen" in caplog.messages


def test_an_abstract_socket_is_one_like_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """As systemd names one where it has no directory to put it in."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        # The kernel chooses its name.
        channel.bind("")
        channel.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", channel.getsockname().decode().replace("\0", "@", 1))

        notify_systemd.ready()

        assert Systemd(channel).messages() == ["READY=1"]


_ABORTED_WHILE_IT_SERVES = """
import os, signal, time
from listener.encoding import Encoder
from tests.harness import TinyEmbedder

def serve():
    # As if this were the last thread to wake up.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGABRT})
    os.kill(os.getpid(), signal.SIGABRT)
    time.sleep(0.5)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGABRT})

encoder = Encoder(TinyEmbedder, 0)
serve()
"""


def test_the_watchdogs_signal_tells_where_the_loop_stands() -> None:
    """In another thread it would tell of a loop that runs meanwhile, and can crash at that."""
    ended = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", _ABORTED_WHILE_IT_SERVES],
        env=environment(Settings()),
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )

    assert ended.returncode == -signal.SIGABRT
    assert "in serve" in ended.stderr.partition("Current thread")[2].partition("Thread 0x")[0]
