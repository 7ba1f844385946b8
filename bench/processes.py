"""Processes under measurement: the real service, and whatever else writes a log."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from datetime import datetime
from pathlib import Path

from bench.cluster import Cluster
from bench.progress import BenchError
from listener.config import Settings

REPOSITORY = Path(__file__).parents[1]

_FIELD = re.compile(r'(\w+)=("(?:[^"\\]|\\.)*"|\S*)')
_LOOK_SECONDS = 0.05
_PATIENCE_SECONDS = 120.0
_LOG_TAIL = 2_000


@dataclass(frozen=True)
class Line:
    """One log line of the service."""

    fields: dict[str, str]

    @property
    def event(self) -> str:
        """The static name of what happened."""
        return self.fields.get("event", "")

    @property
    def seconds(self) -> float:
        """When it was logged, as time.time() counts."""
        return datetime.fromisoformat(self.fields["time"]).timestamp()


@dataclass
class LoggedProcess:
    """A process and the file that takes its stdout and stderr."""

    process: subprocess.Popen[bytes]
    log: Path
    _lines: list[Line] = field(default_factory=list)
    _bytes_read: int = 0

    def lines(self) -> list[Line]:
        """The complete lines so far; reads what is new, so as not to disturb what it watches."""
        with self.log.open("rb") as log:
            log.seek(self._bytes_read)
            complete = b"".join(log.read().rpartition(b"\n")[:2])
        self._bytes_read += len(complete)
        self._lines += [
            Line({name: value.strip('"') for name, value in _FIELD.findall(line)})
            for line in complete.decode().splitlines()
        ]
        return self._lines

    def wait_for(self, event: str) -> Line:
        """The first line of this event. Raises BenchError if the process ends before it."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            found = next((line for line in self.lines() if line.event == event), None)
            if found is not None:
                return found
            self.require_alive(deadline, f"event={event}")

    def wait_for_stored(self, events: int, seconds: float) -> list[Line]:
        """The batches that stored this many events in all. The last one's time ends the drain.

        The service logs a batch once its commit has returned.
        """
        deadline = time.monotonic() + seconds
        while True:
            batches = [line for line in self.lines() if line.event == "batch_stored"]
            if sum(int(line.fields["events"]) for line in batches) >= events:
                return batches
            self.require_alive(deadline, f"{events} events stored")

    def require_alive(self, deadline: float, awaited: str) -> None:
        """Wait a moment. Raises BenchError if the process has ended or the time is up."""
        ended = self.process.poll() is not None
        if ended or time.monotonic() > deadline:
            state = "ended" if ended else "took too long"
            if not ended:
                # PYTHONFAULTHANDLER makes it say where it stands.
                self.process.send_signal(signal.SIGABRT)
                self.process.wait()
            tail = self.log.read_text()[-_LOG_TAIL:]
            raise BenchError(f"a process {state} before {awaited}:\n{tail}")
        time.sleep(_LOOK_SECONDS)


@contextmanager
def service(
    cluster: Cluster, url: str, model: Path, environment: Mapping[str, str]
) -> Iterator[LoggedProcess]:
    """`listener run` with default settings but for `environment`, once it listens."""
    # Not in the repository: a .env there would change what is measured.
    command = [sys.executable, "-m", "listener", "run"]
    where = cluster.folder
    with _worker(command, where, url, model, where / "service.log", environment) as process:
        yield process


@contextmanager
def peer(cluster: Cluster, url: str, model: Path, *command: str) -> Iterator[LoggedProcess]:
    """A worker that is a module of bench/ with its arguments, once it listens."""
    log = cluster.folder / f"{command[0]}.log"
    with _worker([sys.executable, "-m", *command], REPOSITORY, url, model, log, {}) as process:
        yield process


@contextmanager
def _worker(
    command: list[str],
    folder: Path,
    url: str,
    model: Path,
    log: Path,
    environment: Mapping[str, str],
) -> Iterator[LoggedProcess]:
    own = {"DATABASE_URL": url, "EMBEDDING_MODEL": str(model), **environment}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**clean_environment(), **own},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        logged = LoggedProcess(process, log)
        logged.wait_for("listening")
        yield logged
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def clean_environment() -> dict[str, str]:
    """This process's environment without the caller's own settings of the listener."""
    # JOURNAL_STREAM would take the times out of the log.
    unwanted = {spec.name.upper() for spec in fields(Settings)} | {"JOURNAL_STREAM"}
    kept = {name: value for name, value in os.environ.items() if name not in unwanted}
    return {**kept, "HF_HUB_OFFLINE": "1", "PYTHONFAULTHANDLER": "1"}
