"""`listener report`: one page that shows how the service stands and needs nothing else."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from listener.html_report import render_report
from tests.harness import Database, Spawn, listener, serve_once, wait_until

_BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
_SCRIPT = "<script>alert(1)</script>"


def page_of(database: Database, last: int = 10_000) -> str:
    return render_report(database.conn, database.settings, last)


def embed(database: Database, *messages: str) -> list[int]:
    """Insert events and embed them by a real command."""
    ids = database.insert(*messages)
    listener(database.settings, "run", "--once")
    return ids


def test_the_report_is_one_page_in_a_folder_for_the_owner_alone(static: Database) -> None:
    """Its path is the data on stdout."""
    embed(static, "a", "b", "c")
    folder = static.settings.reports_dir

    finished = listener(static.settings, "report")

    path = Path(finished.stdout.strip())
    assert path.parent == folder
    assert folder.stat().st_mode & 0o777 == 0o700
    assert path.read_text("utf-8").startswith("<!doctype html>")


def test_the_report_shows_state_coverage_latency_throughput_parked_and_settings(
    static: Database,
) -> None:
    """Latency is from created_at to embedded_at; throughput goes by embedded_at."""
    first, second, third, fourth = embed(static, "a", "b", "c", "d")
    (parked,) = static.insert("e")
    static.park(parked)
    static.rows("update public.event_embeddings set embedded_at = '2026-01-01 12:00:00+00'")
    static.rows("alter table public.iot_events disable trigger listener_updated")
    for event_id, seconds in {first: 0.05, second: 0.2, third: 0.2, fourth: 7200}.items():
        static.rows(
            "update public.iot_events set created_at = '2026-01-01 12:00:00+00'::timestamptz "
            "- %s * interval '1 second' where id = %s",
            seconds,
            event_id,
        )

    text = re.sub(r"<[^>]*>|\s+", " ", page_of(static))
    text = re.sub(r" +", " ", text)

    assert "Embedded 4 Pending 0" in text
    assert "80.0 % 4 Current embeddings among the newest 5 events" in text
    assert "before 0 0 to 0.1 s 1 to 0.25 s 2" in text
    assert "to 1 h 0 to 1 day 1 longer 0" in text
    assert "Half within 0.20 s" in text
    assert "4 in the busiest second" in text
    assert f"{parked} 5 why" in text
    assert "BATCH_EVENTS 256 (default)" in text
    assert "DATABASE_URL" not in text


def test_the_bars_of_the_throughput_are_as_wide_as_a_phone_needs(static: Database) -> None:
    """Two days of embeddings are bars of an hour; empty hours count."""
    ids = embed(static, *map(str, range(49)))
    static.rows(
        "update public.event_embeddings "
        "set embedded_at = '2026-01-01 00:00:00+00'::timestamptz "
        "+ (event_id - %s) / 2 * interval '2 hours'",
        ids[0],
    )

    text = page_of(static)

    assert "2 in the busiest hour" in text
    assert len(re.findall(r'title="[^"]*: 2"', text)) == 24
    assert len(re.findall(r'title="[^"]*: 0"', text)) == 24


@pytest.mark.parametrize(
    ("apart", "width"),
    [("59 minutes", "minute"), ("60 minutes", "10 minutes"), ("26 years", "30 days")],
)
def test_there_are_no_more_bars_than_sixty_unless_it_took_years(
    database: Database, apart: str, width: str
) -> None:
    """Then they are as wide as can be."""
    first, _ = database.insert("a", "b")
    serve_once(database)
    database.rows("update public.event_embeddings set embedded_at = '2026-01-01 00:00:00+00'")
    database.rows(
        "update public.event_embeddings set embedded_at = embedded_at - %s::interval "
        "where event_id = %s",
        apart,
        first,
    )

    assert f"1 in the busiest {width}<" in page_of(database)


def test_the_times_of_the_throughput_are_in_utc(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the page says, wherever the command runs."""
    database.insert("a")
    serve_once(database)
    database.rows("update public.event_embeddings set embedded_at = '2026-01-01 12:00:00+00'")
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        text = page_of(database)
    finally:
        monkeypatch.undo()
        time.tzset()

    assert "<span>2026-01-01 12:00:00 UTC</span>" in text


def test_the_report_looks_at_no_more_than_the_newest(static: Database) -> None:
    """As many as asked for."""
    embed(static, *map(str, range(20)))

    assert "7 in the busiest" in page_of(static, 7)


def test_what_an_event_says_is_text_and_nothing_else(static: Database) -> None:
    """Markup in a reason, or in a name, is shown as it is."""
    static.park(*static.insert("a"))
    static.rows("update listener.queue set error = %s", _SCRIPT)

    text = page_of(static)

    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text


def test_a_password_in_a_reason_is_not_shown(static: Database) -> None:
    """In whichever form; the characters are such as HTML writes differently."""
    static.park(*static.insert("a"))
    static.rows("update listener.queue set error = 'no way in with p<&\"w or p%3C%26%22w'")
    url = "postgresql://u:p%3C%26%22w@h/db"

    text = page_of(static.with_settings(database_url=url))

    assert "no way in with *** or ***" in text


def test_an_empty_database_has_a_report(static: Database) -> None:
    """The first thing that an operator may try."""
    text = page_of(static)

    assert "None of the newest 10,000 events is embedded" in text
    assert "None is seen" in text


def test_an_event_from_the_end_of_time_has_no_latency(static: Database) -> None:
    """Nor the report a failure."""
    static.rows("alter table public.iot_events alter created_at set default 'infinity'")
    embed(static, "a")

    text = page_of(static)

    assert "Half within" not in text
    assert "1 in the busiest second" in text


def test_without_created_at_the_report_says_so(static: Database) -> None:
    """And has the rest."""
    static.rows("alter table public.iot_events drop column created_at cascade")
    listener(static.owner, "install")
    embed(static, "a")

    text = page_of(static)

    assert "no column created_at" in text
    assert "1 in the busiest second" in text


def test_a_long_report_ends_with_ctrl_c(static: Database, spawn: Spawn) -> None:
    """Its statement, too."""
    embed(static, "a")
    static.rows(
        "create or replace function listener.embedding_input(event public.iot_events) "
        "returns text language plpgsql stable set search_path = '' as "
        "$$ begin perform pg_catalog.pg_sleep(60); return ''; end $$"
    )
    running = (
        "select count(*) from pg_stat_activity "
        "where application_name = 'listener-report' and state = 'active'"
    )
    report = spawn(static.settings, "report")
    # Not a statement before it: what is cancelled between two of them is cancelled in vain.
    wait_until(lambda: static.value(f"{running} and wait_event = 'PgSleep'"))

    code = report.end(signal.SIGINT)

    assert code == 130
    wait_until(lambda: not static.value(running))
    assert "Traceback" not in report.output()


@pytest.mark.skipif(_BROWSER is None, reason="no Chromium on this machine")
def test_the_page_opens_in_a_browser_without_an_error(static: Database, tmp_path: Path) -> None:
    """Nothing on the console, and nothing is asked of anybody."""
    embed(static, "a", "b")
    static.park(*static.insert("c"))
    static.rows("update listener.queue set error = %s", _SCRIPT)
    path = listener(static.settings, "report").stdout.strip()

    opened = subprocess.run(
        [
            str(_BROWSER),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--enable-logging=stderr",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--dump-dom",
            f"file://{path}",
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )

    assert "Embedded over time" in opened.stdout
    assert "CONSOLE" not in opened.stderr
    assert not re.search(r"""(?:src|href)=|url\(|@import""", opened.stdout)
