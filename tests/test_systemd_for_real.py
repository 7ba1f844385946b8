"""The units under a booted systemd: out of the wheel, in their sandbox, with a real model."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psycopg
import pytest

from listener.embedded import Server
from tests.booted_systemd import DEPENDENCIES, SITE, CanNotBoot, Machine, booted, install_listener
from tests.harness import Database, wait_until
from tests.own_server import MakeServer, installed
from tests.proxy import proxied

_ROOT = Path(__file__).parents[1]
_README = (_ROOT / "systemd" / "README.md").read_text("utf-8")
_UNIT = "iot-event-listener.service"
_SWEEP = "iot-event-listener-sweep"
_PASSWORD = "hunter-2"  # noqa: S105  of no real account
# Much longer than a beat, much shorter than the unit's own.
_WATCHDOG_SECONDS = 5


def blocks_of_the_readme(language: str) -> list[str]:
    """Its blocks of code, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", _README, re.MULTILINE | re.DOTALL)


def install_lines() -> list[str]:
    """The three commands that install the units."""
    (block,) = [block for block in blocks_of_the_readme("sh") if "env.example" in block]
    return block.splitlines()


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """Booted, the package and the units installed as the README says, the model converted."""
    wheels = tmp_path_factory.mktemp("wheels")
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "-w", wheels, _ROOT], check=True, capture_output=True)
    try:
        with booted(wheels) as machine:
            install_listener(machine)
            for line in install_lines()[:-1]:
                machine.shell(line)
            for unit in (_UNIT, "iot-event-listener@.service"):
                dropin = f"/etc/systemd/system/{unit}.d/watchdog.conf"
                machine.write(dropin, f"[Service]\nWatchdogSec={_WATCHDOG_SECONDS}\n")
            yield machine
    except CanNotBoot as reason:
        pytest.skip(f"no systemd to boot: {reason}")


@pytest.fixture(scope="module")
def model(minilm: Path) -> str:
    """The real weights, as the machine sees them."""
    return str(DEPENDENCIES / minilm.relative_to(SITE))


@pytest.fixture(scope="module")
def converted(machine: Machine, model: str) -> None:
    """As the README says, before the service has ever run."""
    (convert,) = [
        line
        for line in blocks_of_the_readme("sh")
        if line.startswith("HF_HOME=") and "convert" in line
    ]
    machine.shell(f"export EMBEDDING_MODEL={model}; {convert}")


@dataclass
class Unit:
    """The plain unit, and its settings."""

    machine: Machine
    settings: dict[str, str]
    began: float = field(default_factory=time.time)

    def configure(self, **changes: str) -> None:
        """Write /etc/iot-event-listener/env."""
        lines = [f"{name}={value}\n" for name, value in (self.settings | changes).items()]
        self.machine.write("/etc/iot-event-listener/env", "".join(lines))

    def start(self) -> None:
        """Returns when systemd calls it active."""
        self.machine.run("systemctl", "start", _UNIT)

    def show(self, name: str) -> str:
        return self.machine.show(_UNIT, name)

    def state(self) -> str:
        return self.show("ActiveState")

    def pid(self) -> int:
        return int(self.show("MainPID"))

    def log(self) -> str:
        return self.machine.journal(_UNIT, self.began)

    def wait_to_say(self, words: str) -> None:
        """The journal takes a line in a moment after it was written."""
        try:
            wait_until(lambda: words in self.log())
        except AssertionError as late:
            late.add_note(self.log())
            raise

    def restarts(self) -> int:
        return int(self.show("NRestarts"))

    def process(self, field: str) -> list[str]:
        """A line of the process's status."""
        status = self.machine.run("cat", f"/proc/{self.pid()}/status")
        return next(line.split()[1:] for line in status.splitlines() if line.startswith(field))

    def nice(self) -> int:
        stat = self.machine.run("cat", f"/proc/{self.pid()}/stat")
        return int(stat.rpartition(")")[2].split()[16])

    @contextmanager
    def with_drop_in(self, text: str) -> Iterator[None]:
        """Until the block ends."""
        directory = f"/run/systemd/system/{_UNIT}.d"
        self.machine.write(f"{directory}/test.conf", text)
        self.machine.run("systemctl", "daemon-reload")
        try:
            yield
        finally:
            self.machine.run("rm", "-r", directory)


@pytest.fixture
def unit(
    machine: Machine, converted: None, model: str, server: Server, database: Database
) -> Iterator[Unit]:
    """Stopped, with settings for this test's database; a long poll, so that only LISTEN is fast."""
    assert server.port is not None
    del converted
    address = f"127.0.0.1:{server.port}/{database.conn.info.dbname}"
    settings = {
        "DATABASE_URL": f"postgresql://postgres:{_PASSWORD}@{address}",
        "EMBEDDING_MODEL": model,
        "ENGINE": "openvino",
        "POLL_SECONDS": "600",
    }
    unit = Unit(machine, settings)
    unit.configure()
    machine.shell("systemctl daemon-reload; systemctl reset-failed")
    yield unit
    machine.run("systemctl", "kill", "--signal=SIGKILL", "iot-event-listener*", check=False)
    machine.run("systemctl", "stop", "iot-event-listener*")


@pytest.mark.parametrize("engine", ["torch", "openvino"])
def test_the_three_lines_of_the_readme_start_a_service_that_embeds(
    unit: Unit, database: Database, engine: str
) -> None:
    """With either engine, in the sandbox."""
    unit.configure(ENGINE=engine)

    unit.machine.shell(install_lines()[-1])

    assert unit.state() == "active"
    (event,) = database.insert("door open")
    wait_until(lambda: set(database.embedded()) == {event})
    assert unit.show("UnitFileState") == "enabled"
    assert "Traceback" not in unit.log()


def test_the_sandbox_is_in_force(unit: Unit) -> None:
    """An account of its own, no privilege, filtered system calls, and behind the writers."""
    unit.start()

    assert "0" not in unit.process("Uid:")
    assert unit.process("NoNewPrivs:") == ["1"]
    assert unit.process("CapEff:") == ["0000000000000000"]
    assert unit.process("Seccomp:") == ["2"]
    assert unit.nice() == 10


@pytest.mark.parametrize("nice", [0, 3])
def test_a_drop_in_may_give_it_another_priority(unit: Unit, nice: int) -> None:
    """Where events are as urgent as writers; the sandbox lets the service set none itself."""
    with unit.with_drop_in(f"[Service]\nNice={nice}\n"):
        unit.start()

        assert (unit.state(), unit.nice()) == ("active", nice)


def test_the_sandbox_lets_the_service_move_its_threads(unit: Unit) -> None:
    """To another core; refused, each short text alone takes some milliseconds more."""
    moves = "import os; os.sched_setaffinity(0, os.sched_getaffinity(0))"
    python = "/opt/iot-event-listener/bin/python"
    with unit.with_drop_in(f'[Service]\nExecStartPre={python} -c "{moves}"\n'):
        unit.start()

    assert unit.state() == "active"


def test_the_unit_is_active_only_when_it_listens(
    unit: Unit, server: Server, database: Database
) -> None:
    """Until the database can be reached it is activating; then an insert wakes it at once."""
    assert server.port is not None
    with proxied(server.port) as proxy:
        proxy.refuses = True
        url = unit.settings["DATABASE_URL"].replace(str(server.port), str(proxy.port))
        unit.configure(DATABASE_URL=url)
        unit.machine.run("systemctl", "start", "--no-block", _UNIT)
        unit.wait_to_say("event=connection_lost")
        assert (unit.state(), unit.show("StatusText")) == ("activating", "connecting to Postgres")

        proxy.refuses = False
        wait_until(lambda: unit.state() == "active", 60)

        unit.wait_to_say("event=listening")
        assert database.value("select count(*) from listener.worker") == 1
        database.insert("door open")
        database.wait_for_rest()


def test_the_status_shows_backlog_and_lag(unit: Unit, database: Database) -> None:
    """One line of `systemctl status`."""
    database.insert("waits")
    database.park(*database.insert("parked"))

    unit.start()

    wait_until(
        lambda: re.fullmatch(r"backlog \d+ events, lag [\d.]+ s", unit.show("StatusText")), 60
    )


def test_a_killed_service_comes_back(unit: Unit, database: Database) -> None:
    """What was inserted meanwhile is embedded."""
    unit.start()
    unit.machine.shell(f"kill -KILL {unit.pid()}")

    database.insert("while it was away")

    database.wait_for_rest(30)
    assert unit.restarts() == 1
    assert unit.state() == "active"


def test_a_service_that_hangs_is_restarted_by_the_watchdog(unit: Unit, database: Database) -> None:
    """SIGSTOP, the hang of all threads at once; the log shows that the loop stood."""
    unit.start()
    wait_until(lambda: unit.show("StatusText").startswith("backlog"), 60)
    unit.machine.shell(f"kill -STOP {unit.pid()}")

    database.insert("while it hung")

    wait_until(lambda: unit.restarts() == 1, 60)
    database.wait_for_rest(30)
    for words in ("Watchdog timeout", "Fatal Python error: Aborted", "in serve"):
        unit.wait_to_say(words)


@pytest.mark.parametrize("code", [2, 3])
def test_a_service_that_needs_a_human_stays_down(unit: Unit, database: Database, code: int) -> None:
    """A wrong setting or a missing schema; started again once it is put right."""
    if code == 2:
        unit.configure(BATCH_EVENTS="many")
    else:
        database.rows("alter schema listener rename to away")
    unit.machine.run("systemctl", "start", _UNIT, check=False)

    # Were it to be restarted, it would be activating.
    assert (unit.state(), unit.show("ExecMainStatus")) == ("failed", str(code))
    assert unit.restarts() == 0
    unit.wait_to_say("listener: ")

    unit.configure()
    if code == 3:
        database.rows("alter schema away rename to listener")
    unit.start()


def test_a_stop_in_mid_batch_is_clean(unit: Unit, database: Database) -> None:
    """The batch in hand is finished, the next one given back, exit 0; a start goes on."""
    unit.start()
    ids = database.insert(
        *(f"pump {number} reports a pressure of {number}" for number in range(800))
    )
    wait_until(lambda: len(database.embedded()) > 0 and database.leased() > 0, 60)

    unit.machine.run("systemctl", "stop", _UNIT)

    assert (unit.show("Result"), unit.show("ExecMainStatus")) == ("success", "0")
    assert 0 < len(database.embedded()) < len(ids)
    assert database.leased() == 0
    assert database.value("select count(*) from listener.worker") == 0
    unit.start()
    database.wait_for_rest(60)
    assert len(database.embedded()) == len(ids)


def test_several_workers_share_account_and_queue(unit: Unit, database: Database) -> None:
    """Two instances of the template; when one is stopped the other goes on."""
    unit.machine.run("systemctl", "start", "iot-event-listener@1", "iot-event-listener@2")
    assert database.value("select count(*) from listener.worker") == 2
    database.insert(*map(str, range(100)))
    database.wait_for_rest()

    unit.machine.run("systemctl", "stop", "iot-event-listener@1")

    database.insert("after")
    database.wait_for_rest()
    assert len(database.embedded()) == 101


def test_the_sweep_embeds_what_no_trigger_saw_and_ends(unit: Unit, database: Database) -> None:
    """By hand or by its timer, without a running service."""
    database.insert("missed")
    database.forget_queue()
    timer = f"{_SWEEP}.timer"
    unit.machine.run("systemctl", "enable", "--now", timer)

    unit.machine.run("systemctl", "start", _SWEEP)

    assert len(database.embedded()) == 1
    assert unit.machine.show(f"{_SWEEP}.service", "Result") == "success"
    assert unit.machine.show(timer, "ActiveState") == "active"
    # For a moment after the end it has no next time.
    wait_until(lambda: unit.machine.show(timer, "NextElapseUSecMonotonic") not in {"", "infinity"})


def test_the_password_is_seen_by_nobody(unit: Unit, database: Database) -> None:
    """Not in the journal, not in what systemd shows, not on a command line."""
    unit.start()
    database.insert("a")
    database.wait_for_rest()

    shown = [
        unit.log(),
        unit.machine.run("systemctl", "show", _UNIT),
        unit.machine.run("systemctl", "status", _UNIT),
        unit.machine.shell("cat /proc/[0-9]*/cmdline | tr '\\0' ' '"),
    ]

    assert not [text for text in shown if _PASSWORD in text]


def test_a_password_may_come_as_a_credential(unit: Unit, make_server: MakeServer) -> None:
    """The drop-in of the README, with a server that asks for the password."""
    asking = make_server()
    url = f"postgresql://postgres@127.0.0.1:{asking.port}/postgres"
    with installed(asking) as database:
        conn = database.conn
        conn.execute(f"alter role postgres password '{_PASSWORD}'".encode())
        (asking.home / "data" / "pg_hba.conf").write_text(
            "local all all trust\nhost all all 127.0.0.1/32 scram-sha-256\n"
        )
        conn.execute("select pg_reload_conf()")
        with pytest.raises(psycopg.OperationalError, match="no password"):
            psycopg.connect(url)
        (dropin,) = [block for block in blocks_of_the_readme("ini") if "LoadCredential" in block]
        service = f"[listener]\npassword={_PASSWORD}\n"
        unit.machine.write("/etc/iot-event-listener/pg_service.conf", service)
        unit.configure(DATABASE_URL=url)

        with unit.with_drop_in(dropin):
            unit.start()

        assert unit.state() == "active"
