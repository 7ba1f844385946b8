"""The commands as an operator uses them."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pwd
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest
from rich.console import Console

from listener import demo
from listener.backfill import queue_events
from listener.claim import SweepPage
from listener.config import MOST_EVENTS, Settings
from listener.embedded import Server, _open_to_others, _reachable
from listener.errors import ConfigError, EncoderLost, StatementTimeout
from listener.model import locate
from listener.queue import Queue
from listener.report import Report, require_reports_dir, write_report
from listener.search import describe, nearest
from listener.service import Service
from listener.stop import Stop
from tests.harness import (
    Database,
    NewDatabase,
    Spawn,
    TinyEmbedder,
    claimed,
    empty_folder,
    environment,
    listener,
    serve_once,
    serving,
    vector_of,
    wait_until,
)
from tests.misbehaviour import change_sweep
from tests.own_server import MakeServer, installed
from tests.test_docs import ROOT
from tests.test_install import install_in, with_events


def test_status_counts_and_says_what_the_scope_is(static: Database) -> None:
    """For a reader and as JSON."""
    static.insert("a", "b", "c")
    static.park(1)
    static = static.with_settings(backfill_last_n=2)

    text = listener(static.settings, "status")
    data = json.loads(listener(static.settings, "status", "--json").stdout)

    assert (data["embedded"], data["pending"], data["parked"]) == (0, 2, 1)
    assert data["scope"]["events"] == 2
    assert data["last_error"] == "why"
    assert "0 of 2, BACKFILL_LAST_N" in text.stdout
    assert "1 after 5 attempts: why" in text.stdout
    assert text.stderr == ""


def test_a_worker_is_listed_while_it_lives(database: Database) -> None:
    """A dead one is not."""
    with serving(database):
        wait_until(
            lambda: json.loads(listener(database.settings, "status", "--json").stdout)["workers"]
        )

    assert "worker          none" in listener(database.settings, "status").stdout


def test_shell_and_database_change_neither_a_text_nor_what_a_command_can_read(
    static: Database, spawn: Spawn
) -> None:
    """Encoding and style of dates are the listener's own in each of its sessions."""
    static.rows(f"alter database {static.conn.info.dbname} set datestyle = 'German'")
    (event_id,) = static.insert("Überdruck 🚰")

    service = spawn(static.settings, "run", PGCLIENTENCODING="SQL_ASCII", PGDATESTYLE="SQL")
    service.wait_for("batch_stored")
    status = json.loads(listener(static.settings, "status", "--json").stdout)
    url = static.settings.database_url
    settings = replace(static.settings, database_url=f"{url}&client_encoding=latin1")
    shown = listener(settings, "show", str(event_id), PGCLIENTENCODING="LATIN1")

    assert (status["scope"]["current"], len(status["workers"])) == (1, 1)
    assert "message: Überdruck 🚰" in shown.stdout
    assert re.search(r"state +embedded .*, current, ", shown.stdout)


@pytest.mark.parametrize(("given", "kept"), [(0, 10), (3, 3)])
def test_run_yields_to_the_writers_unless_it_was_given_a_priority(
    static: Database, given: int, kept: int
) -> None:
    """By `nice`, or by Nice= of a unit."""
    if os.getpriority(os.PRIO_PROCESS, 0) != 0:
        pytest.skip("the tests were given a priority, and what they start inherits it")
    command = ["nice", f"-n{given}", sys.executable, "-m", "listener", "run"]
    process = subprocess.Popen(command, env=environment(static.settings), cwd=empty_folder())
    try:
        wait_until(lambda: static.value("select count(*) from listener.worker"), 60)

        assert os.getpriority(os.PRIO_PROCESS, process.pid) == kept
    finally:
        process.terminate()
        process.wait(30)


def test_show_tells_text_tokens_state_and_neighbours(static: Database) -> None:
    """What would be embedded, exactly."""
    first, *_ = static.insert("pump running hot", "pump running warm", "door open", "word " * 600)
    before = listener(static.settings, "show", str(first)).stdout
    listener(static.settings, "run", "--once")

    after = listener(static.settings, "show", str(first)).stdout

    assert "state     pending, waiting" in before
    assert re.search(r"tokens +\d+$", after, re.MULTILINE)
    assert "message: pump running hot" in after
    assert re.search(r"state +embedded .*, current, ", after)
    assert after.splitlines()[after.splitlines().index("neighbours") + 1].endswith("running warm")


def test_show_calls_the_vector_of_another_model_outdated(static: Database) -> None:
    """Though it is of the current text: no search by this model finds it."""
    (event,) = static.insert("door open")
    serve_once(static)

    shown = listener(static.settings, "show", str(event)).stdout

    assert "outdated, tests/tiny@1/fp32" in shown


def test_no_terminal_obeys_what_a_device_wrote(static: Database) -> None:
    """Control characters are shown as escapes, in a text, a hit and the reason of a failure."""
    (event_id,) = static.insert("\x1b[2Jpump\r hot\x9b1m")
    listener(static.settings, "run", "--once")
    static.park(*static.insert("b"))
    static.rows("update listener.queue set error = %s", "\x1b]0;owned\x07\nworker          none")

    shown = [
        listener(static.settings, *arguments).stdout
        for arguments in (("show", str(event_id)), ("search", "pump"), ("status",))
    ]

    assert "message: \\x1b[2Jpump" in shown[0]
    assert "\\x1b[2Jpump" in shown[1]
    assert "\\x1b]0;owned\\x07" in shown[2]
    # Nor does one pass for a line of ours.
    assert shown[2].splitlines().count("worker          none") == 1
    assert not [text for text in shown if re.search(r"[^\n\t -~\xa0-\U0010ffff]", text)]


def test_what_a_terminal_has_no_letter_for_is_an_escape(static: Database) -> None:
    """An old encoding fails no command."""
    (event_id,) = static.insert("温度")

    shown = listener(static.settings, "show", str(event_id), PYTHONIOENCODING="latin-1").stdout

    assert "message: \\u6e29\\u5ea6" in shown


@pytest.mark.parametrize(("event_id", "says"), [("999", "no event 999"), ("x", "not of the type")])
def test_show_of_no_event_says_so(database: Database, event_id: str, says: str) -> None:
    """Exit 2 and one line."""
    finished = listener(database.settings, "show", event_id, check=False)

    assert finished.returncode == 2
    assert says in finished.stderr


def test_show_where_nothing_is_installed_says_so(database: Database) -> None:
    """Exit 3 and one line."""
    database.rows("drop schema listener cascade")

    finished = listener(database.settings, "show", "1", check=False)

    assert finished.returncode == 3
    (line,) = finished.stderr.splitlines()
    assert line.endswith("run `listener install`")


def test_an_event_that_was_parked_and_has_changed_is_shown_as_pending(database: Database) -> None:
    """It is tried again already."""
    (event_id,) = database.insert("a")
    database.park(event_id)
    database.rows("update public.iot_events set message = 'b'")

    state = describe(database.conn, str(event_id))

    assert state is not None
    assert (state.pending, state.parked) == (True, False)


def test_an_event_whose_claim_came_to_nothing_is_shown_as_waiting(database: Database) -> None:
    """Its lease is kept, to tell that it was claimed, but nobody holds it any more."""
    (event_id,) = database.insert("a")
    with database.service_session() as conn:
        claimed(Queue(conn, database.settings, None))
    held = describe(database.conn, str(event_id))
    database.rows("update listener.queue set due_at = now()")

    left = describe(database.conn, str(event_id))

    assert held is not None
    assert left is not None
    assert (held.leased, left.leased) == (True, False)


def test_search_finds_by_meaning(database: Database, converted: Settings) -> None:
    """With real weights, and words that the event doesn't have."""
    real = database.with_settings(
        embedding_model=converted.embedding_model, model_cache=converted.model_cache
    )
    real.insert("bearing temperature of pump 7 above its limit", "door left open", "battery low")
    listener(real.settings, "run", "--once")

    found = listener(real.settings, "search", "pump running hot", "--limit", "2")

    assert len(found.stdout.splitlines()) == 2
    assert "bearing temperature" in found.stdout.splitlines()[0]


def test_a_search_finds_no_vector_of_another_model(database: Database) -> None:
    """How near it is to one of this model's means nothing."""
    other, own = database.insert("same", "same")
    serve_once(database)
    database.rows("update public.event_embeddings set model = 'other' where event_id = %s", other)

    found = nearest(database.conn, vector_of("same"), TinyEmbedder.fingerprint, limit=2)

    assert [hit.event_id for hit in found] == [own]


@pytest.mark.parametrize("plan", ["nestloop", "hashjoin"])
def test_what_is_nearest_comes_first_whatever_the_plan(database: Database, plan: str) -> None:
    """A join may give its rows in any order."""
    database.insert(*map(str, range(400)))
    serve_once(database)
    database.rows("analyze")
    with database.session() as conn:
        conn.execute(f"set enable_{plan} = off".encode())

        found = [
            hit.similarity for hit in nearest(conn, vector_of("7"), TinyEmbedder.fingerprint, 300)
        ]

    assert found == sorted(found, reverse=True)


def test_search_without_pgvector_says_so(static: Database) -> None:
    """Exit 3 and one line."""
    static.rows("drop extension vector cascade")

    finished = listener(static.settings, "search", "pump", check=False)

    assert finished.returncode == 3
    assert finished.stderr == "listener: the database has no pgvector; run `listener install`\n"


def test_search_before_anything_is_embedded_says_so(static: Database) -> None:
    """An empty answer would look like a bad search."""
    finished = listener(static.settings, "search", "anything", check=False)

    assert finished.returncode == 2
    assert "no event is embedded" in finished.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["search", " "], "give a text"), (["install", "--columns", "message,"], "--columns takes")],
)
def test_an_argument_that_names_nothing_is_refused(
    database: Database, arguments: list[str], says: str
) -> None:
    """Exit 2; an empty text has no meaning to search for, an empty name is no column."""
    finished = listener(database.settings, *arguments, check=False)

    assert finished.returncode == 2
    assert says in finished.stderr


@pytest.mark.parametrize("closed", ["2>&-", "<&- >&- 2>&-"])
def test_a_closed_stderr_is_no_reason_to_embed_nothing(static: Database, closed: str) -> None:
    """As a shell gives it, and who makes a daemon of what it starts."""
    static.insert("a")
    command = shlex.join([sys.executable, "-m", "listener", "run", "--once"])

    finished = subprocess.run(
        ["/bin/sh", "-c", f"exec {command} {closed}"], env=environment(static.settings), check=False
    )

    assert finished.returncode == 0
    assert len(static.embedded()) == 1


def test_backfill_works_by_itself_reports_and_is_harmless_twice(static: Database) -> None:
    """Newest first, no more than asked."""
    ids = static.insert(*map(str, range(3000)))
    static.forget_queue()

    first = listener(static.settings, "backfill", "--last", "2500", "--work")
    second = listener(static.settings, "backfill", "--last", "2500", "--work")

    assert sorted(static.embedded()) == ids[-2500:]
    assert "queued 2500" in first.stderr
    assert "events/s" in first.stderr
    assert "queued 0" in second.stderr
    assert len(list(static.settings.reports_dir.glob("*_backfill.md"))) == 2


def test_backfill_does_not_wait_for_what_came_after_it(static: Database, spawn: Spawn) -> None:
    """Where devices never rest, something always waits."""
    static.insert("a", "b")
    embedder = TinyEmbedder(fingerprint=locate(static.settings).fingerprint)
    embedder.may_run.clear()
    with serving(static.with_settings(retry_seconds=3600.0), embedder):
        wait_until(lambda: static.value("select count(*) from listener.worker"))
        backfill = spawn(static.settings, "backfill", "--all")
        backfill.wait_for("2 pending")

        static.insert("raise, and wait for an hour")
        embedder.may_run.set()

        wait_until(lambda: backfill.process.poll() is not None)
    assert backfill.process.returncode == 0
    assert "1 pending; report in" in backfill.output()


def test_backfill_with_another_model_than_the_service_has_is_refused(static: Database) -> None:
    """It would queue all that is embedded, as in a shell without the settings of the unit."""
    static.insert("a")
    with serving(static):
        static.wait_for_rest()

        finished = listener(static.settings, "backfill", "--all", check=False)

    assert finished.returncode == 2
    assert "embeds with tests/tiny@1/fp32; set the same EMBEDDING_MODEL" in finished.stderr
    assert static.queue() == []


def test_backfill_of_all_removes_embeddings_of_events_that_are_gone(static: Database) -> None:
    """Deleted while triggers were off, constraints too."""
    static.insert("a", "b")
    listener(static.settings, "run", "--once")
    static.rows("set session_replication_role = replica")
    static.rows("delete from public.iot_events where message = 'a'")
    assert len(static.embedded()) == 2

    listener(static.settings, "backfill", "--all")

    assert len(static.embedded()) == 1


def test_a_backfill_gets_by_with_a_short_statement_timeout(static: Database) -> None:
    """Of its role, or of the database."""
    ids = static.insert(*map(str, range(5)))
    static.forget_queue()
    change_sweep(static, "p_limit > 2", "perform pg_sleep(9)")
    limit = "-c statement_timeout=200ms"

    finished = listener(static.settings, "backfill", "--all", PGOPTIONS=limit)

    assert "looked at 5, queued 5" in finished.stderr
    assert [row.event_id for row in static.queue()] == ids


def test_a_backfill_ends_where_even_a_page_of_one_event_takes_too_long(database: Database) -> None:
    """No smaller one is left to try."""
    database.insert("a", "b")
    change_sweep(database, "true")
    with database.session() as conn:
        conn.execute("set statement_timeout = '100ms'")
        pages = queue_events(
            Queue(conn, database.settings, None), TinyEmbedder.fingerprint, 2, None
        )

        with pytest.raises(StatementTimeout):
            list(islice(pages, 10))


def test_after_a_time_out_the_pages_of_a_backfill_grow_again(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have been a lock's, and there may be millions to look at."""
    sizes: list[int] = []

    def sweep(*arguments: Any) -> SweepPage:
        *_, events, _ = arguments
        sizes.append(events)
        if len(sizes) == 1:
            raise StatementTimeout("locked")
        return SweepPage(events, 0, None if len(sizes) == 5 else "further")

    monkeypatch.setattr(Queue, "sweep", sweep)
    queue = Queue(database.conn, database.settings, None)

    list(queue_events(queue, TinyEmbedder.fingerprint, None, None))

    assert sizes == [sizes[0], sizes[0] // 2, sizes[0], sizes[0], sizes[0]]


def test_a_backfill_that_may_not_look_for_orphans_follows_all_the_same(static: Database) -> None:
    """And says so."""
    change_sweep(static, "true", "return query select 0::bigint, 0::bigint, null::text; return")
    with static.session() as other, other.transaction():
        other.execute("lock table public.event_embeddings in access exclusive mode")
        finished = listener(
            static.settings, "backfill", "--all", PGOPTIONS="-c statement_timeout=200ms"
        )

    assert "gave up looking for embeddings of events that are gone" in finished.stderr
    (report,) = static.settings.reports_dir.glob("*_backfill.md")
    assert "deleted no embeddings" in report.read_text()


def test_a_backfill_that_is_stopped_while_it_queues_reports_what_it_did(
    static: Database, spawn: Spawn
) -> None:
    """The page in hand is finished; run again, it goes on."""
    static.insert(*map(str, range(5000)))
    static.forget_queue()
    change_sweep(static, "p_from is not null", "perform pg_advisory_xact_lock_shared(1)")
    static.rows("select pg_advisory_lock(1)")
    backfill = spawn(static.settings, "backfill", "--all", "--work")
    backfill.wait_for("looked at 2000")
    wait_until(lambda: static.waits("listener-backfill"))

    backfill.process.send_signal(signal.SIGINT)
    static.rows("select pg_advisory_unlock(1)")

    assert backfill.process.wait(30) == 0
    (report,) = static.settings.reports_dir.glob("*_backfill.md")
    assert "stopped before the end" in report.read_text()
    assert len(static.queue()) == 4000


def test_backfill_without_a_service_says_who_could_work(static: Database) -> None:
    """Rather than wait for ever."""
    static.insert("a")

    finished = listener(static.settings, "backfill", "--all")

    assert "--work" in finished.stderr
    (report,) = static.settings.reports_dir.glob("*_backfill.md")
    assert "not followed: no service is seen" in report.read_text()


def test_a_backfill_that_loses_its_connection_takes_its_worker_along(
    static: Database, make_server: MakeServer, spawn: Spawn
) -> None:
    """While the database stays away, that would look for it for ever."""
    server = make_server()
    with installed(server, static.settings) as database:
        database.insert("a")
        database.rows("begin; lock table public.event_embeddings in share row exclusive mode")
        backfill = spawn(database.owner, "backfill", "--last", "1", "--work")
        backfill.wait_for("1 pending")

        server.stop("immediate")
        database.conn.close()

        wait_until(lambda: backfill.process.poll() is not None)
    assert backfill.process.returncode == 2
    (report,) = database.settings.reports_dir.glob("*_backfill.md")
    assert re.search(r"queued 0\n- ended by an error: .", report.read_text())


def test_a_backfill_whose_worker_fails_fails(static: Database, tmp_path: Path) -> None:
    """Whatever it was; its report doesn't say that it was followed to the end."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "torch.py").write_text("raise OSError('libcublas.so: cannot open')")
    static.insert("a")
    path = os.pathsep.join([str(tmp_path / "broken"), str(ROOT)])

    finished = listener(
        static.settings, "backfill", "--all", "--work", check=False, ENGINE="torch", PYTHONPATH=path
    )

    assert finished.returncode == 1
    assert "libcublas.so" in finished.stderr
    (report,) = static.settings.reports_dir.glob("*_backfill.md")
    assert "ended by an error: libcublas.so" in report.read_text()
    assert "followed" not in report.read_text()


_LOSE_THE_ENCODER = """
from listener import service
from listener.errors import EncoderLost

def run(*_, **__):
    raise EncoderLost("the GPU failed")

service.Service.run = run
"""


def test_a_backfill_whose_process_must_end_leaves_a_report(
    static: Database, tmp_path: Path
) -> None:
    """What it queued is queued."""
    (tmp_path / "sitecustomize.py").write_text(_LOSE_THE_ENCODER)
    static.insert("a")
    static.forget_queue()
    path = os.pathsep.join([str(tmp_path), str(ROOT)])

    finished = listener(
        static.settings, "backfill", "--all", "--work", check=False, PYTHONPATH=path
    )

    assert finished.returncode == 1
    assert "listener: the GPU failed" in finished.stderr
    (report,) = static.settings.reports_dir.glob("*_backfill.md")
    assert "queued 1" in report.read_text()
    assert "ended by an error: the GPU failed" in report.read_text()


def test_status_says_why_the_coverage_is_unknown(static: Database, tmp_path: Path) -> None:
    """A directory that is not all there is on this machine, too."""
    settings = replace(static.settings, embedding_model=str(tmp_path))

    assert "unknown: the model in" in listener(settings, "status").stdout


def test_a_report_that_can_not_be_written_says_that_the_rest_is_done(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a disk that has become full."""
    require_reports_dir(database.settings)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)

    with pytest.raises(ConfigError, match=r"can't be written \(No space left.*is done"):
        write_report(database.settings, Report("retry", [], [], [], "nothing"))


def test_a_moment_that_no_time_zone_can_tell_is_a_usage_error(static: Database) -> None:
    """The least date of some languages."""
    finished = listener(
        static.settings, "backfill", "--all", "--since", "0001-01-01", check=False, TZ="Asia/Tokyo"
    )

    assert finished.returncode == 2
    assert "--since" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_the_largest_scope_is_counted(static: Database) -> None:
    """All there is."""
    static.insert("a")

    said = listener(static.settings, "status", BACKFILL_LAST_N=str(MOST_EVENTS)).stdout

    assert "0 of 1" in said


def test_backfill_since_looks_at_no_older_events(static: Database) -> None:
    """--since goes by created_at."""
    static.insert("old", "new")
    static.forget_queue()
    static.rows("alter table public.iot_events disable trigger listener_updated")
    static.rows("update public.iot_events set created_at = '2020-01-01' where message = 'old'")
    static.rows("alter table public.iot_events enable always trigger listener_updated")

    listener(static.settings, "backfill", "--all", "--since", "2024-01-01")

    assert [row.event_id for row in static.queue()] == [2]


def test_since_by_a_created_at_that_the_install_did_not_see_is_refused(static: Database) -> None:
    """Until the next install events are in the order of their ids, and have no time."""
    static.rows("alter table public.iot_events rename created_at to seen_at")
    install_in(static.conn)
    static.rows("alter table public.iot_events rename seen_at to created_at")
    static.insert("a")
    static.forget_queue()
    arguments = ("backfill", "--all", "--since", "2024-01-01")

    refused = listener(static.settings, *arguments, check=False)
    install_in(static.conn)
    listener(static.settings, *arguments)

    assert refused.returncode == 3
    assert "run `listener install`" in refused.stderr
    assert len(static.queue()) == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["backfill"], "give either --last N or --all"),
        (["backfill", "--all", "--last", "1"], "give either --last N or --all"),
        (["retry"], "give ids or --all"),
        (["retry", "1", "--all"], "give ids or --all"),
    ],
)
def test_what_is_meant_must_be_said_and_said_once(
    database: Database, arguments: list[str], says: str
) -> None:
    """Of two, one would be ignored."""
    database.park(*database.insert("a", "b"))

    finished = listener(database.settings, *arguments, check=False)

    assert finished.returncode == 2
    assert says in finished.stderr
    assert [row.is_parked for row in database.queue()] == [True, True]


def test_backfill_last_0_sweeps_nothing(static: Database) -> None:
    """Whatever BACKFILL_LAST_N says."""
    static.insert("a")
    static.forget_queue()

    listener(static.settings, "run", "--once", "--backfill-last", "0")

    assert static.embedded() == {}


@pytest.mark.parametrize(
    "arguments",
    [["install", "--columns", "message"], ["uninstall"], ["retry", "--all"], ["backfill", "--all"]],
)
def test_nothing_is_changed_where_no_report_could_be_written(
    static: Database, arguments: list[str]
) -> None:
    """A folder may be there and closed to us; how to undo it would be known to nobody."""
    parked, _ = static.insert("a", "b")
    static.park(parked)
    text = "select listener.embedding_input(e) from public.iot_events e where id = %s"
    before = static.queue(), static.value(text, parked)
    settings = replace(
        static.owner,
        embedding_model=static.settings.embedding_model,
        reports_dir=Path("/proc/self"),
    )

    finished = listener(settings, *arguments, check=False)

    assert finished.returncode == 2
    assert "can't be written" in finished.stderr
    assert (static.queue(), static.value(text, parked)) == before


def test_reports_of_the_same_second_are_apart_and_a_line_of_one_is_one_line(
    tmp_path: Path,
) -> None:
    """Whatever the server says in it."""
    report = Report("retry", ["DETAIL:\n  of two\n  lines"], [], [], "None.")
    settings = Settings(database_url="", reports_dir=tmp_path)

    first, second = write_report(settings, report), write_report(settings, report)

    assert first != second
    assert "\n- DETAIL: of two lines\n" in first.read_text()


def test_retry_takes_ids_or_all_and_names_what_is_not_parked(database: Database) -> None:
    """Exit 2 if an id was wrong; the right ones are retried all the same."""
    database.park(*database.insert("a", "b"))

    one = listener(database.settings, "retry", "1", "77", check=False)
    rest = listener(database.settings, "retry", "--all")

    assert (one.returncode, rest.returncode) == (2, 0)
    assert "not parked: 77" in one.stderr
    assert not database.parked()


def test_retry_takes_an_id_however_it_is_written(new_database: NewDatabase, tmp_path: Path) -> None:
    """As `show` does, which finds what it names."""
    event_id = "a702cdb6-0000-4000-8000-00000000000f"
    with new_database() as url, with_events(url, "id uuid primary key, t text") as database:
        install_in(database.conn)
        database.rows("insert into public.iot_events values (%s, 'a')", UUID(event_id))
        database.rows(
            "insert into listener.queue (event_id, due_at) select id, 'infinity' from iot_events"
        )
        settings = replace(database.settings, reports_dir=tmp_path)

        wrong = listener(settings, "retry", "17", check=False)
        listener(settings, "retry", event_id.upper())

    assert wrong.returncode == 2
    assert "'17' is not of the type of iot_events.id" in wrong.stderr
    assert f"back to the queue: {event_id}" in next(tmp_path.glob("*_retry.md")).read_text()


def test_a_server_that_is_not_there_is_one_clear_line(tmp_path: Path) -> None:
    """Exit 2, no traceback."""
    settings = Settings(database_url="postgresql://nobody@127.0.0.1:1/x", reports_dir=tmp_path)

    finished = listener(settings, "status", check=False)

    assert finished.returncode == 2
    assert "no connection to Postgres" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_a_second_demo_in_the_same_place_is_refused(open_folder: Path, tmp_path: Path) -> None:
    """The first to end would stop the server of both."""
    settings = Settings(database_url="", reports_dir=tmp_path)
    descriptor = os.open(open_folder, os.O_RDONLY)
    # Which refuses nobody who would share it.
    fcntl.flock(descriptor, fcntl.LOCK_SH)

    finished = listener(settings, "demo", "--events", "1", check=False, DEMO_DIR=str(open_folder))

    os.close(descriptor)
    assert finished.returncode == 2
    assert "a demo runs in DEMO_DIR" in finished.stderr


def test_a_place_for_the_demo_that_can_not_be_made_is_one_clear_line(tmp_path: Path) -> None:
    """As the home of an account that has none."""
    settings = Settings(database_url="", reports_dir=tmp_path)

    finished = listener(settings, "demo", check=False, DEMO_DIR="/proc/x")

    assert finished.returncode == 2
    assert "DEMO_DIR /proc/x can't be written" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_the_server_of_the_demo_is_for_its_owner_alone(server: Server, open_folder: Path) -> None:
    """Who reaches it is superuser, without a password: no TCP, and a socket in a closed folder."""
    made = Server.prepared(open_folder / "postgres", server.programs)
    made.start()
    try:
        with psycopg.connect(made.url()) as conn:
            assert conn.execute("show listen_addresses").fetchone() == ("",)
        assert made.home.stat().st_mode & 0o777 == 0o700
    finally:
        made.stop("immediate")


def test_ctrl_c_does_not_reach_what_prepares_the_server_of_the_demo(open_folder: Path) -> None:
    """Half a data directory would be in the way of the next start."""
    program = open_folder / "initdb"
    program.write_text("#!/bin/sh\ncut -d' ' -f6 /proc/$$/stat\nexit 1\n")
    program.chmod(0o755)

    with pytest.raises(ConfigError) as told:
        Server(open_folder, open_folder)._run("initdb")

    assert int(str(told.value).split()[-1]) != os.getsid(0)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has another account run it")
def test_the_server_that_root_starts_is_in_none_of_roots_groups(open_folder: Path) -> None:
    """What these may read or write is none of its business."""
    program = open_folder / "initdb"
    program.write_text("#!/bin/sh\nid -G\nexit 1\n")
    program.chmod(0o755)
    ours = os.getgroups()
    os.setgroups([0])
    try:
        with pytest.raises(ConfigError) as told:
            Server(open_folder, open_folder)._run("initdb")
    finally:
        os.setgroups(ours)

    assert str(told.value).endswith(f"failed: {pwd.getpwnam('nobody').pw_gid}")


def test_binaries_that_are_closed_to_others_are_copied_for_the_server_of_root(
    open_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole, once, and not where the server's account could change what root runs."""
    programs = open_folder / "closed" / "package" / "pginstall" / "bin"
    programs.mkdir(parents=True)
    for part in ("package/pginstall/bin/initdb", "package.libs/libpq.so"):
        (open_folder / "closed" / part).parent.mkdir(exist_ok=True)
        (open_folder / "closed" / part).write_text("")
    # To be read, but not entered.
    (open_folder / "closed").chmod(0o704)
    home = open_folder / "demo" / "postgres"
    left_by_one_that_was_killed = open_folder / "demo" / "server-half" / "package"
    left_by_one_that_was_killed.mkdir(parents=True)
    monkeypatch.setattr(os, "geteuid", lambda: 0)

    mask = os.umask(0o077)
    copy = _reachable(programs, home)
    os.umask(mask)

    assert _open_to_others(copy)
    assert copy.is_relative_to(home.parent)
    assert not copy.is_relative_to(home)
    assert (copy / "initdb").is_file()
    assert (copy.parents[2] / "package.libs" / "libpq.so").is_file()
    made = (copy / "initdb").stat()
    assert _reachable(programs, home) == copy
    assert (copy / "initdb").stat() == made
    assert _reachable(copy, home) == copy


def test_a_demo_whose_service_fails_ends_with_its_error(
    static: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, and it is not waited for a vector."""

    def fails(_: Service) -> None:
        raise EncoderLost("the GPU failed")

    monkeypatch.setattr(Service, "run", fails)

    with pytest.raises(EncoderLost, match="the GPU failed"):
        demo._serve_and_feed(static.settings, static.conn, None, Stop(), Console(quiet=True))


def test_a_demo_whose_server_does_not_start_shows_what_the_server_said(
    open_folder: Path, tmp_path: Path
) -> None:
    """pg_ctl says no more than that it failed."""
    settings = Settings(database_url="", reports_dir=tmp_path)

    finished = listener(settings, "demo", check=False, DEMO_DIR=str(open_folder / ("x" * 100)))

    assert finished.returncode == 2
    assert "is too long" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_the_demo_shows_events_and_a_search_and_goes_on_where_it_was(
    open_folder: Path, tmp_path: Path
) -> None:
    """What `make run` does without a database."""
    settings = Settings(database_url="", reports_dir=tmp_path, model_cache=tmp_path)
    open_folder = open_folder / "our demo's"
    open_folder.mkdir()
    # A relative place, and where another server is.
    elsewhere = {"PGPORT": "5433", "PGHOSTADDR": "192.0.2.1"}
    first = listener(
        settings, "demo", "--events", "3", check=True, cwd=open_folder, DEMO_DIR=".", **elsewhere
    )
    second = listener(settings, "demo", "--events", "21", DEMO_DIR=str(open_folder))
    assert not any(open_folder.glob("postgres/data/postmaster.pid"))

    assert "0 events so far, 0 embedded" in first.stdout
    assert len(re.findall(r"^ *[\d.]+ ms ", first.stdout, re.MULTILINE)) == 3
    assert "3 events so far, 3 embedded" in second.stdout
    assert "search “" in second.stdout
