"""No password is ever shown: not in output, logs, reports, tracebacks or the list of processes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import psycopg
import pytest

from listener import cli, console
from listener.config import Settings
from listener.embedded import Server
from listener.logs import redact
from listener.report import Report, write_report
from tests.harness import Database, Spawn, listener
from tests.own_server import MakeServer
from tests.test_docs import COMMANDS

# Each part of a password gives it away. The second one's characters read differently in a URL, in
# JSON, in HTML and in a repr.
IN_VARIABLE = "hunter1-s3cret"
IN_URL = "hunter2@<&\"'\\/:%-s3cret"
IN_PASSFILE = "hunter3-s3cret"
GIVEAWAYS = ("hunter1", "hunter2", "hunter3", "s3cret")

RUN_TO_THE_END = (
    ["install", "--dry-run"],
    ["install", "--columns", "message"],
    ["check"],
    ["status"],
    ["status", "--json"],
    ["report"],
    ["backfill", "--all"],
    ["show", "1"],
    ["search", "x"],
    ["retry", "--all"],
    ["model", "fetch"],
    ["model", "convert"],
    ["demo", "--nonsense"],
    ["uninstall"],
)
# Without a server every command ends at the connection, so these are enough.
WITHOUT_SERVER = (
    ["install", "--dry-run"],
    ["check"],
    ["status"],
    ["report"],
    ["search", "x"],
    ["backfill", "--all"],
)
# What they say before they are stopped, with a server and without; without one a watch ends.
RUN_UNTIL_STOPPED = (
    (["run"], "event=listening", "connection_lost"),
    (["status", "--watch"], "last error", "no connection"),
)


def assert_nothing_given_away(said: str) -> None:
    assert [part for part in GIVEAWAYS if part in said] == []


def test_no_command_is_left_out() -> None:
    """A new one must be added above."""
    run = list(RUN_TO_THE_END) + [row[0] for row in RUN_UNTIL_STOPPED]

    covered = {
        name for name in COMMANDS if any(name == " ".join(a[: len(name.split())]) for a in run)
    }

    assert covered == COMMANDS.keys()


@pytest.fixture
def secretive(static: Database, tmp_path: Path) -> Iterator[tuple[Settings, dict[str, str]]]:
    """Settings with a password in the URL, and variables that hold two more."""
    static.rows("create role secretive login superuser")
    static.insert("a")
    passfile = tmp_path / "passfile"
    passfile.write_text(f"*:*:*:*:{IN_PASSFILE}\n")
    passfile.chmod(0o600)
    user = f"secretive:{quote(IN_URL, safe='')}@"
    settings = replace(
        static.settings, database_url=static.owner.database_url.replace("postgres@", user)
    )
    yield settings, {"PGPASSWORD": IN_VARIABLE, "PGPASSFILE": str(passfile), "LOG_LEVEL": "debug"}
    static.rows("drop owned by secretive")
    static.rows("drop role secretive")


@pytest.mark.parametrize("reaches", [True, False], ids=["server", "no server"])
def test_no_command_shows_a_password(
    secretive: tuple[Settings, dict[str, str]], spawn: Spawn, tmp_path: Path, reaches: bool
) -> None:
    """Whether things go well or not."""
    settings, variables = secretive
    if not reaches:
        url = f"postgresql://secretive:{quote(IN_URL, safe='')}@127.0.0.1:1/x"
        settings = replace(settings, database_url=url)

    said = ""
    for arguments, with_server, without in RUN_UNTIL_STOPPED:
        running = spawn(settings, *arguments, **variables)
        if not (reaches is False and arguments[0] == "status"):
            running.wait_for(with_server if reaches else without)
            running.end()
        running.process.wait(20)
        assert (with_server if reaches else without) in running.output()
        said += running.output()
    for arguments in RUN_TO_THE_END if reaches else WITHOUT_SERVER:
        finished = listener(settings, *arguments, check=False, cwd=tmp_path, **variables)
        said += finished.stdout + finished.stderr
    reports = list(settings.reports_dir.glob("*"))
    for report in reports:
        said += report.read_text("utf-8")

    assert len(reports) >= 4 or not reaches
    assert len(said) > 1000
    assert_nothing_given_away(said)


def test_the_list_of_processes_shows_no_password(
    secretive: tuple[Settings, dict[str, str]], spawn: Spawn
) -> None:
    """Neither ours nor the server's."""
    settings, variables = secretive
    running = spawn(settings, "run", **variables)
    running.wait_for("event=listening")

    shown = ""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        # One may end before it is read.
        with suppress(OSError):
            shown += path.read_text(errors="replace")

    assert "secretive" in shown
    assert_nothing_given_away(shown)


@pytest.fixture
def strict(make_server: MakeServer) -> Server:
    """A server that asks for a password; it is IN_URL."""
    server = make_server()
    with psycopg.connect(server.url(), autocommit=True) as admin:
        admin.execute(
            psycopg.sql.SQL("create role secretive login superuser password {}").format(IN_URL)
        )
    rules = server.home / "data" / "pg_hba.conf"
    rules.write_text("local all postgres trust\nlocal all all scram-sha-256\n")
    with psycopg.connect(server.url(), autocommit=True) as admin:
        admin.execute("select pg_reload_conf()")
    return server


@pytest.mark.parametrize(
    "way", ["url", "conninfo", ".env", "PGPASSWORD", "PGPASSFILE", "wrong password"]
)
def test_each_way_to_give_a_password_works_and_shows_nothing(
    strict: Server, tmp_path: Path, way: str
) -> None:
    """libpq's own included."""
    parts = f"user=secretive host={strict.home} port={strict.port} dbname=postgres"
    quoted = IN_URL.replace("\\", "\\\\").replace("'", "\\'")
    password = "hunter2" if way == "wrong password" else quote(IN_URL, safe="")
    url = f"postgresql://secretive:{password}@/postgres?host={strict.home}&port={strict.port}"
    passfile = tmp_path / "passfile"
    passfile.write_text("*:*:*:secretive:" + IN_URL.replace("\\", "\\\\").replace(":", "\\:"))
    passfile.chmod(0o600)
    variables = {
        "url": {"DATABASE_URL": url},
        "wrong password": {"DATABASE_URL": url},
        "conninfo": {"DATABASE_URL": f"{parts} password='{quoted}'"},
        ".env": {},
        "PGPASSWORD": {"DATABASE_URL": parts, "PGPASSWORD": IN_URL},
        "PGPASSFILE": {"DATABASE_URL": parts, "PGPASSFILE": str(passfile)},
    }[way]
    if way == ".env":
        (tmp_path / ".env").write_text(f"DATABASE_URL={url}\n")
    inherited = {name: value for name, value in os.environ.items() if name != "DATABASE_URL"}

    finished = subprocess.run(
        [sys.executable, "-m", "listener", "check"],
        env={**inherited, **variables, "EMBEDDING_MODEL": "/nowhere"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )

    connected = "ok    connection  postgres as secretive" in finished.stdout
    assert connected == (way != "wrong password")
    assert_nothing_given_away(finished.stdout + finished.stderr)


@pytest.mark.parametrize("shape", ["{url}", "{password}", "{password!r}", "{quoted}"])
def test_a_bug_ends_with_exit_1_and_a_traceback_without_the_password(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], shape: str
) -> None:
    """In whichever form an exception carries it."""
    quoted = quote(IN_URL, safe="")
    url = f"postgresql://u:{quoted}@h/db"
    monkeypatch.setenv("DATABASE_URL", url)
    message = shape.format(url=url, password=IN_URL, quoted=quoted)

    def broken(**_: object) -> None:
        raise RuntimeError(f"lost {message}")

    monkeypatch.setattr(cli.cli, "main", broken)
    monkeypatch.setattr("sys.argv", ["listener", "status"])

    with pytest.raises(SystemExit) as ended:
        cli.main()

    said = capsys.readouterr().err
    assert ended.value.code == 1
    assert "Traceback" in said
    assert_nothing_given_away(said)


def test_no_report_holds_a_password(tmp_path: Path) -> None:
    """A step may be an error in the server's words; the file outlives the terminal."""
    url = "postgresql://user:hunter2@host/x"  # no real one
    lines = [f"failed at {url}", "password hunter2"]

    path = write_report(
        Settings(database_url=url, reports_dir=tmp_path),
        Report("backfill", lines, lines, lines, " ".join(lines)),
    )

    assert "hunter2" not in path.read_text()
    assert path.read_text().count("***") == 8


def test_a_connection_string_in_another_settings_place_is_hidden_too(static: Database) -> None:
    """A slip of the hand; these print what was set, or a message with it."""
    settings = replace(static.settings, embedding_model="postgresql://u:hunter2@h/db")

    said = listener(settings, "check", check=False).stdout
    page = Path(listener(settings, "report").stdout.strip()).read_text("utf-8")
    stood = listener(settings, "status").stdout
    in_json = listener(settings, "status", "--json").stdout

    for shown in (said, page, stood, in_json):
        assert "postgresql://u:***@h/db" in shown
        assert_nothing_given_away(shown)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://user@host/x?sslmode=verify-full&sslpassword=hunter%402",
        "host=h sslpassword='hunter@2'",
    ],
)
def test_the_passphrase_of_a_clients_key_is_a_secret(url: str) -> None:
    """As the password is, in each form."""
    secrets = Settings(database_url=url).secrets()

    assert redact("hunter@2 hunter%402", secrets) == "*** ***"


@pytest.mark.parametrize("is_set", [True, False], ids=["set", "not set"])
@pytest.mark.parametrize(
    "shape",
    [
        "postgresql://u:{}@h/db",
        "postgresql://u:x/{}@h/db",
        "host=h password={}",
        "host=h password = {}",
        "host=h password=x&{}",
        "host=h password='x {}'",
        "postgresql://u:x y{}@h/db",
    ],
)
def test_a_connection_string_that_is_no_argument_is_quoted_without_its_password(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    shape: str,
    is_set: bool,
) -> None:
    """As psql takes it; the error of the usage repeats what it was given."""
    url = shape.format(quote(IN_URL, safe=""))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATABASE_URL", url if is_set else "")

    for arguments in (["status", url], [url]):
        monkeypatch.setattr("sys.argv", ["listener", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()

        said = capfd.readouterr()
        assert ended.value.code == 2
        assert "Usage: " in said.err
        assert_nothing_given_away(said.out + said.err)


def test_the_folder_of_reports_is_for_its_owner_alone(database: Database) -> None:
    """Whichever command makes it, whatever the umask."""
    shutil.rmtree(database.settings.reports_dir, ignore_errors=True)
    database.park(*database.insert("a"))

    listener(database.settings, "retry", "--all")

    assert database.settings.reports_dir.stat().st_mode & 0o777 == 0o700


def test_a_secret_that_begins_with_another_is_hidden_whole() -> None:
    """The longer one first, or its end would be shown."""
    assert redact("hunter2-of-the-key hunter2", {"hunter2", "hunter2-of-the-key"}) == "*** ***"


@pytest.mark.parametrize("name", ["DATABASE_URL", "PGPASSWORD"])
def test_a_password_is_hidden_where_another_setting_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str
) -> None:
    """The settings can't tell then what is a secret."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BATCH_EVENTS", "many")
    monkeypatch.setenv(name, "hunter2")

    console.say("lost hunter2")

    assert capsys.readouterr().err == "lost ***\n"
