"""`listener check` passes only where the service would work, and each FAIL tells the remedy."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest

from listener import queries
from listener.checks import run_checks
from listener.checks_link import is_over_a_network
from listener.config import Settings
from listener.embedded import Server
from listener.finding import Finding
from listener.status import other_model
from listener.worker import LOCK_CLASS
from tests.harness import (
    Database,
    TinyEmbedder,
    empty_folder,
    environment,
    listener,
    role,
    serving,
    wait_until,
)
from tests.own_server import MakeServer, become_standby, installed
from tests.pooler import needs_pgbouncer, pooled

NAMES = [
    "settings",
    "model",
    "connection",
    "tls",
    "server",
    "notify",
    "clock",
    "extension",
    "iot_events",
    "schema",
    "rights",
    "grants",
    "search",
    "workers",
]


def findings(database: Database) -> dict[str, Finding]:
    """What `listener check` finds, by name."""
    return {finding.name: finding for finding in run_checks(database.settings)}


def failed(database: Database) -> list[str]:
    return [name for name, finding in findings(database).items() if not finding.ok]


def test_check_passes_where_the_service_would_work(static: Database) -> None:
    """One line per precondition."""
    finished = listener(static.settings, "check")

    lines = finished.stdout.splitlines()
    assert all(line.startswith("ok") for line in lines)
    assert [line.split()[1] for line in lines] == NAMES


@pytest.mark.parametrize(
    ("damage", "name", "remedy", "code"),
    [
        ("drop schema listener cascade", "schema", "listener install", 3),
        (
            "alter table public.iot_events disable trigger listener_inserted",
            "schema",
            "listener install",
            3,
        ),
        ("drop table public.iot_events cascade", "iot_events", "create it first", 3),
        ("drop extension vector cascade", "extension", "create extension", 3),
        (
            "drop view listener.embedding cascade; "
            "alter table public.event_embeddings alter embedding type public.vector(100)",
            "schema",
            "not vector(384); rename that table",
            3,
        ),
        ("drop table listener.queue cascade", "rights", "listener install", 3),
        ("drop sequence listener.worker_token", "rights", "listener install", 3),
        ("revoke insert on listener.worker from listener_worker", "rights", "grant", 3),
        (
            "revoke execute on function listener.sweep(text, text, integer, timestamptz) "
            "from listener_worker",
            "rights",
            "grant",
            3,
        ),
    ],
)
def test_check_fails_with_the_remedy(
    static: Database, damage: str, name: str, remedy: str, code: int
) -> None:
    """And with the exit code that the service would end with."""
    static.rows(damage)

    finished = listener(static.settings, "check", check=False)

    assert finished.returncode == code
    (line,) = [text for text in finished.stdout.splitlines() if text.startswith(f"FAIL  {name}")]
    assert remedy in line


def test_check_warns_of_a_schema_that_an_install_would_change(static: Database) -> None:
    """As after an upgrade of the package alone."""
    static.rows("update listener.applied set digest = 'old' where file = '004_sweep.sql'")

    found = findings(static)["schema"]

    assert found.state == "warn"
    assert "run `listener install`" in found.detail


def test_check_does_not_warn_of_an_old_file_that_an_install_might_not_run(static: Database) -> None:
    """The text may be your own, the roles another's to make; the triggers are looked at."""
    static.rows(
        "update listener.applied set digest = 'old' where file = any(%s)",
        [
            "003_embedding_input.sql",
            "006_owner.sql",
            "007_triggers.sql",
            "009_worker.sql",
        ],
    )

    assert findings(static)["schema"].state == "ok"


@pytest.mark.parametrize("rights", ["all", "select, truncate", "select, trigger"])
def test_check_warns_of_rights_that_reach_past_row_level_security(
    static: Database, rights: str
) -> None:
    """As after a restore under default privileges; with what takes them back."""
    with role(static.conn, '"re-store"') as restored:
        static.rows(f"grant {rights} on public.event_embeddings to {restored}, public")

        found = findings(static)["grants"]

        assert found.state == "warn"
        static.rows(found.detail.partition("; ")[2])
        assert findings(static)["grants"].state == "ok"
        assert static.value(
            "select has_table_privilege('re-store', 'public.event_embeddings', 'select')"
        )


def test_nothing_that_another_worker_wrote_passes_for_a_line_of_check(static: Database) -> None:
    """Its model may be any text, and a terminal obeys some."""
    static.rows(
        "insert into listener.worker (worker, host, pid, model) values (7, 'here', 1, %s)",
        "\x1b[2J\nok    workers     1 running",
    )
    with static.session() as other:
        other.execute("select pg_advisory_lock(%s, 7)", [LOCK_CLASS])

        lines = listener(static.settings, "check").stdout.splitlines()

    assert [line.split()[1] for line in lines] == NAMES
    assert lines[-1].startswith("warn  workers")
    assert "\x1b" not in lines[-1]


def test_check_ends_as_the_service_would_at_the_first_that_fails(static: Database) -> None:
    """It loads the model before it connects: exit 2, though the schema, exit 3, is missing, too."""
    static.rows("drop schema listener cascade")

    finished = listener(static.settings, "check", check=False, EMBEDDING_MODEL="/nowhere")

    failed = [line.split()[1] for line in finished.stdout.splitlines() if line.startswith("FAIL")]
    assert failed[0] == "model"
    assert "schema" in failed
    assert finished.returncode == 2


def test_check_tries_every_statement_by_which_a_claim_can_end(
    static: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first event to fail, or the first stop, would else be what finds out."""
    tried, execute = set(), psycopg.Cursor.execute

    def noting(cursor: Any, statement: Any, *given: Any, **options: Any) -> Any:
        tried.add(str(statement).removeprefix(queries.WITH_ALL_EVENTS))
        return execute(cursor, statement, *given, **options)

    monkeypatch.setattr(psycopg.Cursor, "execute", noting)

    assert findings(static)["rights"].ok

    assert {queries.WRITE, queries.DISCARD, queries.FAIL, queries.RELEASE, queries.EXTEND} <= tried


def test_a_missing_model_fails(database: Database) -> None:
    """The rest is checked all the same."""
    database = database.with_settings(embedding_model="/nowhere")

    assert failed(database) == ["model"]
    assert list(findings(database)) == NAMES


def test_a_port_for_metrics_without_the_package_fails(
    static: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service would end there, too."""
    watched = static.with_settings(metrics_port=9409)
    assert findings(watched)["metrics"].ok

    monkeypatch.setattr("listener.endpoint.find_spec", lambda _: None)

    assert failed(watched) == ["metrics"]


def test_a_view_that_only_status_needs_is_a_warning(static: Database) -> None:
    """Every line is told all the same."""
    static.rows("drop view listener.live_worker cascade")

    workers = findings(static)["workers"]

    assert (workers.ok, workers.warns) == (True, True)
    assert "`listener status` would fail" in workers.detail


# --- the way to the server -----------------------------------------------------------------------


@needs_pgbouncer
@pytest.mark.parametrize(("mode", "passes"), [("transaction", False), ("session", True)])
def test_a_transaction_pooler_fails_and_a_session_pooler_passes(
    server: Server, static: Database, open_folder: Path, mode: str, passes: bool
) -> None:
    """By the NOTIFY that returns or doesn't; the ports are alike."""
    with pooled(server, open_folder, mode) as port:
        found = findings(static.through(port))

    assert found["notify"].ok == passes
    assert passes or "session pooler" in found["notify"].detail
    assert all(finding.ok for name, finding in found.items() if name != "notify")


def test_polling_on_purpose_passes(static: Database) -> None:
    """NOTIFY=never asks for no notification."""
    assert "polls" in findings(static.with_settings(notify="never"))["notify"].detail


def test_a_standby_fails(make_server: MakeServer, static_model: Path) -> None:
    """It can be read, but neither claimed nor listened on."""
    server = make_server("wal_level=replica")
    with installed(server, Settings(embedding_model=str(static_model))) as database:
        settings = database.owner
    become_standby(server)

    found = list(run_checks(settings))

    assert (found[-1].name, found[-1].state, found[-1].exit_code) == ("server", "FAIL", 2)
    assert "connect to the primary" in found[-1].detail


@pytest.mark.skipif(
    subprocess.run(["unshare", "--user", "--net", "true"], capture_output=True).returncode != 0,
    reason="no network namespaces for this account",
)
def test_a_host_with_ipv6_only_is_named_where_there_is_no_ipv6(static: Database) -> None:
    """In a namespace without any network; the driver says only that the network is unreachable."""
    settings = replace(static.settings, database_url="postgresql://postgres@[2001:db8::1]/x")

    finished = subprocess.run(
        ["unshare", "--user", "--net", sys.executable, "-m", "listener", "check"],
        env=environment(settings),
        cwd=empty_folder(),
        capture_output=True,
        text=True,
        check=False,
    )

    assert finished.returncode == 2
    assert "IPv6 addresses only" in finished.stdout
    assert "session pooler" in finished.stdout


def own_address() -> str:
    """An address of this machine that isn't loopback; skips where there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("198.51.100.1", 9))
        except OSError:
            pytest.skip("this machine has no network")
        return str(probe.getsockname()[0])


@contextmanager
def over_tls(server: Server, database: Database, certificate: Path, key: Path) -> Iterator[str]:
    """The database over the network behind a PgBouncer that offers TLS; gives the URL."""
    address = own_address()
    options = (
        "client_tls_sslmode = allow",
        f"client_tls_cert_file = {certificate}",
        f"client_tls_key_file = {key}",
    )
    with pooled(server, certificate.parent, "session", *options, address=address) as port:
        yield f"postgresql://postgres@{address}:{port}/{database.conn.info.dbname}"


@pytest.fixture
def certificate(open_folder: Path) -> tuple[Path, Path]:
    """A certificate that this machine made for its own address, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl on this machine")
    made, key = open_folder / "server.crt", open_folder / "server.key"
    name = f"subjectAltName=IP:{own_address()}"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=test"]
    command += ["-addext", name, "-out", str(made), "-keyout", str(key)]
    subprocess.run(command, check=True, capture_output=True)
    if os.geteuid() == 0:
        shutil.chown(key, "nobody")
    return made, key


@needs_pgbouncer
@pytest.mark.parametrize(
    ("mode", "state"),
    [
        ("disable", "warn"),
        ("prefer", "warn"),
        ("require", "ok"),
        ("verify-full", "ok"),
    ],
)
def test_a_way_over_the_network_that_may_be_in_the_clear_is_a_warning(
    server: Server,
    static: Database,
    certificate: tuple[Path, Path],
    mode: str,
    state: str,
) -> None:
    """The service works; exit 0. libpq's own variables count."""
    with over_tls(server, static, *certificate) as url:
        settings = replace(static.settings, database_url=url)
        root = str(certificate[0])

        finished = listener(settings, "check", PGSSLMODE=mode, PGSSLROOTCERT=root)

    (line,) = [text for text in finished.stdout.splitlines() if text.split()[1] == "tls"]
    assert line.startswith(state)
    assert (state == "ok") or "sslmode=require" in line


@needs_pgbouncer
def test_a_server_that_the_root_certificate_does_not_vouch_for_is_not_talked_to(
    server: Server, static: Database, tmp_path: Path, certificate: tuple[Path, Path]
) -> None:
    """sslmode=verify-full with sslrootcert in the connection string, by another authority."""
    other = tmp_path / "other"
    other.mkdir()
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=other"]
    command += ["-out", str(other / "root.crt"), "-keyout", str(other / "root.key")]
    subprocess.run(command, check=True, capture_output=True)
    with over_tls(server, static, *certificate) as url:
        url += f"?sslmode=verify-full&sslrootcert={other / 'root.crt'}"

        finished = listener(replace(static.settings, database_url=url), "check", check=False)

    assert finished.returncode == 2
    assert "certificate verify failed" in finished.stdout


@pytest.mark.parametrize(
    ("address", "is_remote"),
    [("", False), ("127.0.0.1", False), ("::1", False), ("192.0.2.7", True), ("2001:db8::7", True)],
)
def test_what_is_a_way_over_the_network(address: str, is_remote: bool) -> None:
    """A Unix socket has no address."""
    assert is_over_a_network(address) == is_remote


def test_a_clock_that_differs_is_a_warning(
    static: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but the times in the log depends on it."""
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 60)

    found = findings(static)["clock"]

    assert found.state == "warn"
    assert "60 s ahead" in found.detail


# --- the database --------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["''", "pg_temp, other"])
def test_the_search_path_of_the_role_does_not_matter(static: Database, path: str) -> None:
    """Everything is found by its full name, the operators of the search too."""
    with role(static.conn, "lost", "login in role listener_worker"):
        static.rows(f"alter role lost set search_path = {path}")
        url = static.owner.database_url.replace("//postgres@", "//lost@")
        lost = static.with_settings(database_url=url)
        static.insert("a")
        assert [finding.state for finding in findings(lost).values()] == ["ok"] * len(NAMES)
        listener(lost.settings, "run", "--once")
        assert "0.0" not in listener(lost.settings, "search", "a").stdout

    assert len(static.embedded()) == 1


@pytest.mark.parametrize(
    ("index", "state", "detail"),
    [
        ("hnsw (embedding vector_cosine_ops)", "ok", "by index wanted"),
        ("hnsw (embedding vector_l2_ops)", "warn", "vector_l2_ops"),
        ("ivfflat (embedding vector_ip_ops) with (lists = 1)", "warn", "vector_ip_ops"),
        ("hnsw ((embedding::halfvec(384)) halfvec_cosine_ops)", "warn", "halfvec_cosine_ops"),
    ],
)
def test_an_index_that_no_search_can_use_is_a_warning(
    static: Database, index: str, state: str, detail: str
) -> None:
    """It costs each write and serves nobody."""
    if "halfvec" in index and static.value("select to_regtype('public.halfvec')") is None:
        pytest.skip("before pgvector 0.7 there is no halfvec")
    static.rows(f"create index wanted on public.event_embeddings using {index}")

    found = findings(static)["search"]

    assert found.state == state
    assert detail in found.detail


def test_an_index_whose_build_failed_is_a_warning(static: Database) -> None:
    """As `create index concurrently` leaves it."""
    static.rows(
        "create index half on public.event_embeddings using hnsw (embedding vector_cosine_ops)"
    )
    static.rows("update pg_index set indisvalid = false where indexrelid = 'half'::regclass")

    assert "half is invalid" in findings(static)["search"].detail


def test_a_moved_extension_is_a_warning_until_the_next_install(static: Database) -> None:
    """The service works on; the search doesn't find its operator."""
    static.rows("create schema elsewhere")
    static.rows("alter extension vector set schema elsewhere")

    before = findings(static)
    listener(static.owner, "install")
    after = findings(static)

    assert (before["search"].state, after["search"].state) == ("warn", "ok")
    assert "listener install" in before["search"].detail
    assert all(finding.ok for finding in before.values())
    assert "elsewhere" in after["extension"].detail


def test_a_worker_with_another_model_is_a_warning(static: Database) -> None:
    """Each would embed again what the other did."""
    with serving(static):
        wait_until(lambda: static.value("select count(*) from listener.worker"))
        found = findings(static)["workers"]

    assert found.state == "warn"
    assert TinyEmbedder.fingerprint in found.detail


@pytest.mark.parametrize("other", ["b@1/fp32", "a@2/fp32", "a@1/bf16"])
def test_workers_whose_models_differ_in_anything_are_told(other: str) -> None:
    """In name, revision or precision: each would embed anew what the other has embedded."""
    workers = [
        {"worker": 1, "host": "h", "model": "a@1/fp32"},
        {"worker": 2, "host": "h", "model": other},
    ]

    assert f"worker 2 on h embeds with {other}" in (other_model(workers, "a@1/fp32") or "")
    assert other_model(workers[:1], "a@1/fp32") is None
