"""Real `listener run` processes, and a supervisor that starts again what died, as systemd would."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from bench.processes import REPOSITORY, clean_environment
from tests.soak.background import Background

_LOOK_SECONDS = 0.05
_LEAVE_SECONDS = 60.0


@dataclass
class Worker:
    """One place that a process fills, again and again; its log is that of all of them."""

    name: str
    log: Path
    environment: dict[str, str]
    process: subprocess.Popen[bytes]
    began_at: int = 0
    is_ordered_to_end: bool = False

    def is_ready(self) -> bool:
        """Whether the present process lives and has said that it listens."""
        if self.process.poll() is not None:
            return False
        with self.log.open("rb") as log:
            log.seek(self.began_at)
            return b"event=listening" in log.read()

    def tail(self, lines: int) -> str:
        """The last lines of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


@dataclass(frozen=True)
class Ending:
    """A process that ended without being told to."""

    worker: str
    code: int
    tail: str


@dataclass
class Settings:
    """The settings of all workers; long polls and no sweep, so that nothing lost is found again."""

    lease_seconds: float = 10.0
    poll_seconds: float = 60.0
    retry_seconds: float = 0.5
    extra: dict[str, str] = field(default_factory=dict)

    def variables(self) -> dict[str, str]:
        """As environment variables."""
        return {
            "LEASE_SECONDS": str(self.lease_seconds),
            "POLL_SECONDS": str(self.poll_seconds),
            "RETRY_SECONDS": str(self.retry_seconds),
            "BACKFILL_LAST_N": "0",
            **self.extra,
        }


class Workers(Background):
    """The processes, one for each connection string."""

    def __init__(self, folder: Path, urls: list[str], model: Path, settings: Settings) -> None:
        super().__init__("supervisor")
        self._folder = folder
        self._code = _copied(folder / "code")
        self._lock = threading.Lock()
        self.endings: list[Ending] = []
        self.starts = 0
        self.all: list[Worker] = []
        for number, url in enumerate(urls, 1):
            environment = {
                **clean_environment(),
                **settings.variables(),
                "DATABASE_URL": url,
                "EMBEDDING_MODEL": str(model),
            }
            log = folder / f"worker-{number}.log"
            process = self._spawn(environment, log)
            self.all.append(Worker(f"worker {number}", log, environment, process))

    def step(self) -> None:
        """Start again what has ended."""
        for worker in self.all:
            code = worker.process.poll()
            if code is None or self.stopped.is_set():
                continue
            with self._lock:
                # Only the harness sends these.
                if code != -signal.SIGKILL and not (worker.is_ordered_to_end and code == 0):
                    self.endings.append(Ending(worker.name, code, worker.tail(15)))
                worker.is_ordered_to_end = False
                worker.began_at = worker.log.stat().st_size
                worker.process = self._spawn(worker.environment, worker.log)
        self.stopped.wait(_LOOK_SECONDS)

    def ready(self) -> list[Worker]:
        """Those that serve."""
        return [worker for worker in self.all if worker.is_ready()]

    def wait_ready(self, count: int, seconds: float = 90.0) -> bool:
        """Whether this many served within the time."""
        deadline = time.monotonic() + seconds
        while len(self.ready()) < count:
            if time.monotonic() > deadline or self.failure is not None:
                return False
            time.sleep(_LOOK_SECONDS)
        return True

    def send(self, worker: Worker, number: signal.Signals) -> None:
        """Signal the present process; one that has ended is left to the supervisor."""
        with self._lock:
            if number == signal.SIGTERM:
                worker.is_ordered_to_end = True
            worker.process.send_signal(number)

    def leave(self) -> dict[str, int | None]:
        """SIGTERM to all, for good. Returns each one's exit code; None had to be killed."""
        self.end()
        for worker in self.all:
            worker.process.send_signal(signal.SIGCONT)
            worker.process.terminate()
        return {worker.name: self._ended(worker) for worker in self.all}

    def kill_all(self) -> None:
        """Whatever state they are in; for a harness that ends in an error."""
        self.end()
        for worker in self.all:
            worker.process.kill()
            worker.process.wait()

    def _ended(self, worker: Worker) -> int | None:
        try:
            return worker.process.wait(_LEAVE_SECONDS)
        except subprocess.TimeoutExpired:
            worker.process.kill()
            worker.process.wait()
            return None

    def _spawn(self, environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
        self.starts += 1
        environment = {**environment, "PYTHONPATH": str(self._code)}
        with log.open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "listener", "run"],
                # Not in the repository: a .env there would change what is tested.
                cwd=self._folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # Ctrl-C is for the harness, which ends them in its own time.
                start_new_session=True,
            )


def _copied(code: Path) -> Path:
    """The product as it is now: whoever edits it meanwhile doesn't change what is tested."""
    for part in ("listener", "sql"):
        shutil.copytree(REPOSITORY / part, code / part, dirs_exist_ok=True)
    return code
