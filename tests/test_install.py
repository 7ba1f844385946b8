"""install and uninstall: all or nothing, twice is once, and the user's table stays the user's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner

from listener import install
from listener.catalogue import read_facts
from listener.cli import cli
from listener.config import Settings
from listener.database import Connection, connect
from listener.errors import ConnectionLost, SchemaError
from listener.preflight import require_installable
from listener.queue import Queue
from listener.template import Step, sql_text
from listener.vectors import register_vector
from tests.harness import (
    Database,
    NewDatabase,
    TinyEmbedder,
    empty_folder,
    environment,
    listener,
    role,
    serve_once,
    serving,
)
from tests.misbehaviour import replace_input
from tests.test_docs import README


def install_in(conn: Connection, columns: list[str] | None = None) -> install.Plan:
    """What the command does. Returns the plan that was carried out."""
    facts = read_facts(conn)
    require_installable(facts)
    plan = install.plan_install(conn, facts, columns)
    install.apply_plan(conn, plan)
    install.verify(conn)
    register_vector(conn)
    return plan


def uninstall_in(conn: Connection, *, drop_embeddings: bool) -> None:
    """What the command does."""
    install.apply_plan(conn, install.plan_uninstall(read_facts(conn), drop_embeddings))


@contextmanager
def with_events(url: str, columns: str) -> Iterator[Database]:
    """A database with an iot_events of these columns, not installed."""
    settings = Settings(database_url=url, poll_seconds=120.0)
    with connect(settings, "listener-test") as conn:
        conn.execute(f"create table public.iot_events ({columns})".encode())
        yield Database(settings, conn, settings)


@contextmanager
def creator(admin: Connection, name: str, attributes: str = "nologin") -> Iterator[None]:
    """A role that may create schemas, and tables in public."""
    with role(admin, name, attributes):
        admin.execute(f"grant create on schema public to {name}".encode())
        admin.execute(f'grant create on database "{admin.info.dbname}" to {name}'.encode())
        yield


def described(conn: Connection) -> dict[str, Any]:
    """Everything about iot_events that an install could change."""
    statements = {
        "columns": "select attname, atttypid, attnotnull from pg_attribute "
        "where attrelid = 'public.iot_events'::regclass and attnum > 0 order by attnum",
        "triggers": "select tgname from pg_trigger where tgrelid = 'public.iot_events'::regclass "
        "order by tgname",
        "indexes": "select indexrelid from pg_index where indrelid = 'public.iot_events'::regclass",
        "constraints": "select conname from pg_constraint "
        "where conrelid = 'public.iot_events'::regclass",
        "acl": "select relacl, relowner from pg_class where oid = 'public.iot_events'::regclass",
    }
    return {name: conn.execute(text.encode()).fetchall() for name, text in statements.items()}


KEYS = {
    "bigint": "id bigint generated always as identity primary key",
    "integer": "id serial primary key",
    "uuid": "id uuid primary key default gen_random_uuid()",
    "text": "id text primary key default 'key-' || (random() * 1e9)::bigint",
}


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("time", ["created_at timestamptz", "created_at timestamp not null", ""])
def test_every_kind_of_key_is_embedded_swept_and_found(
    new_database: NewDatabase, key: str, time: str
) -> None:
    """bigint, integer, uuid and text; with and without a usable created_at."""
    columns = ", ".join(filter(None, [KEYS[key], "message text", time and f"{time} default now()"]))
    with new_database() as url, with_events(url, columns) as database:
        install_in(database.conn)
        if "not null" in time:
            database.rows("create index on public.iot_events (created_at)")
            database.rows("drop trigger listener_inserted on public.iot_events")
            install_in(database.conn)
        insert = "insert into public.iot_events (message) values ('a'), ('b'), (null) returning id"
        ids = {event_id for (event_id,) in database.rows(insert)}

        with serving(database):
            database.wait_for_rest()
        embedded = set(database.embedded())
        database.rows("delete from public.event_embeddings")
        serve_once(database)

        assert embedded == ids
        assert set(database.embedded()) == ids
        database.assert_invariant()
        assert database.value("select count(*) from listener.describe(%s)", str(ids.pop())) == 1


@pytest.mark.parametrize("created_at", ["timestamptz", "text not null default 'yesterday'"])
def test_a_created_at_that_is_null_or_no_time_hides_no_event_from_the_sweep(
    new_database: NewDatabase, created_at: str
) -> None:
    """Though it has an index."""
    columns = f"{KEYS['uuid']}, message text, created_at {created_at}"
    with new_database() as url, with_events(url, columns) as database:
        database.rows("create index on public.iot_events (created_at)")
        database.rows("insert into public.iot_events (message) values ('a'), ('b')")
        install_in(database.conn)

        serve_once(database)

        assert len(database.embedded()) == 2


@pytest.mark.parametrize(
    "index",
    [
        "using brin (created_at)",
        "using hash (created_at)",
        "(created_at) where created_at > '2026-01-01'",
        "(device_id, created_at)",
        "(created_at desc nulls last)",
        "(created_at nulls first)",
    ],
)
def test_an_index_that_gives_no_order_does_not_make_created_at_the_order_of_the_sweep(
    database: Database, index: str
) -> None:
    """It serves no "newest first", and each page would sort the whole table."""
    database.rows("alter table public.iot_events alter created_at set not null")
    indexes = database.rows(
        "select indexrelid::regclass::text from pg_index "
        "where indrelid = 'public.iot_events'::regclass and not indisprimary"
    )
    for (name,) in indexes:
        database.rows(f"drop index public.{name}")
    database.rows(f"create index on public.iot_events {index}")

    assert not read_facts(database.conn).created_at_is_indexed

    database.rows("create index good on public.iot_events (created_at desc)")
    assert read_facts(database.conn).created_at_is_indexed
    # As a failed `create index concurrently` leaves it.
    database.rows("update pg_index set indisvalid = false where indexrelid = 'good'::regclass")
    assert not read_facts(database.conn).created_at_is_indexed


def test_a_second_install_changes_nothing_and_waits_for_no_lock_on_iot_events(
    database: Database,
) -> None:
    """Even while a migration holds the table."""
    before = database.rows("select xmin::text, file from listener.applied order by file")
    with database.session() as migration, migration.transaction():
        migration.execute("lock table public.iot_events in access exclusive mode")

        with database.session() as conn:
            conn.execute("set lock_timeout = '1s'")
            plan = install.plan_install(conn, read_facts(conn), None)
            install.verify(conn)

    assert plan.steps == ()
    assert database.rows("select xmin::text, file from listener.applied order by file") == before


def test_a_failing_install_leaves_nothing_behind(new_database: NewDatabase) -> None:
    """All or nothing."""
    with new_database() as url, with_events(url, "id bigint primary key, message text") as database:
        facts = read_facts(database.conn)
        plan = install.plan_install(database.conn, facts, None)
        broken = replace(plan, steps=(*plan.steps, Step("broken", "select 1 / 0")))

        with pytest.raises(SchemaError, match=r"refused it \(division by zero\); nothing was"):
            install.apply_plan(database.conn, broken)

        assert database.value("select to_regnamespace('listener')") is None
        assert database.value("select to_regclass('public.event_embeddings')") is None


def test_an_install_whose_connection_breaks_was_not_refused(database: Database) -> None:
    """No object and no right is to be looked for."""
    fatal = Step("fatal", "select pg_terminate_backend(pg_backend_pid())")

    with database.session() as conn, pytest.raises(ConnectionLost):
        install.apply_plan(conn, install.Plan((fatal,), ()))


@pytest.mark.parametrize(
    ("command", "table", "says"),
    [
        ("install", "listener.queue", 'refused it (column "lane"'),
        ("uninstall", "listener.orders", "is not this listener's"),
    ],
)
def test_a_schema_listener_of_somebody_else_is_one_clear_line(
    new_database: NewDatabase, tmp_path: Path, command: str, table: str, says: str
) -> None:
    """Exit 3, and what is theirs stays; as after a wrong DATABASE_URL."""
    with new_database() as url, with_events(url, "id bigint primary key, message text") as database:
        database.rows("create schema listener")
        database.rows(f"create table {table} (job text)")
        settings = database.with_settings(reports_dir=tmp_path).settings

        finished = listener(settings, command, check=False)

        assert finished.returncode == 3
        assert says in finished.stderr
        assert "Traceback" not in finished.stderr
        assert database.value("select to_regclass(%s)", table) is not None
        assert database.value("select to_regclass('public.event_embeddings')") is None


def test_an_install_that_nobody_hears_leaves_its_report(
    new_database: NewDatabase, tmp_path: Path
) -> None:
    """Its steps go into a pipe whose reader has gone, as with `| head -1`."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    with new_database() as url, with_events(url, "id bigint primary key, message text") as database:
        settings = replace(database.settings, reports_dir=tmp_path)
        command = [sys.executable, "-m", "listener", "install"]
        variables, folder = environment(settings), empty_folder()
        subprocess.run(command, env=variables, cwd=folder, stderr=write_end, check=False)
        os.close(write_end)

        install.verify(database.conn)
    assert list(tmp_path.glob("*_install.md"))


def test_an_install_whose_result_is_not_whole_leaves_its_report(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has changed something."""

    def verify(_: Connection) -> None:
        raise SchemaError("not whole")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATABASE_URL", database.owner.database_url)
    monkeypatch.setattr(install, "verify", verify)
    database.rows("alter table public.iot_events disable trigger listener_inserted")

    finished = CliRunner().invoke(cli, ["install"])

    assert isinstance(finished.exception, SchemaError)
    assert list(tmp_path.glob("_reports/*_install.md"))


def test_an_uninstall_where_nothing_is_installed_says_so(
    new_database: NewDatabase, tmp_path: Path
) -> None:
    """Else a wrong name of a database passes for a listener that is gone."""
    with new_database() as url:
        settings = Settings(database_url=url, reports_dir=tmp_path)
        finished = listener(settings, "uninstall")

    assert "nothing to do: the listener is not installed in database" in finished.stderr


def test_an_uninstall_takes_out_triggers_whose_schema_somebody_has_damaged(
    database: Database,
) -> None:
    """They may fail every writer."""
    database.rows("drop table listener.applied")

    uninstall_in(database.conn, drop_embeddings=False)

    assert database.value("select to_regnamespace('listener')") is None
    database.insert("a")


def test_an_uninstall_says_which_role_stays(database: Database, tmp_path: Path) -> None:
    """As one that may read a table of the operator's, for an embedding_input of theirs."""
    database.rows("create table public.devices (name text)")
    database.rows("grant select on public.devices to listener_worker")
    settings = replace(database.owner, reports_dir=tmp_path)

    first, second = listener(settings, "uninstall"), listener(settings, "uninstall")

    assert "note: role listener_worker stays" in first.stderr
    assert "nothing to do" in second.stderr
    (report,) = tmp_path.glob("*_uninstall.md")
    assert "role listener_worker stays" in report.read_text()


def test_uninstall_leaves_iot_events_as_it_was(new_database: NewDatabase) -> None:
    """Triggers, constraints, columns, rights: nothing of ours stays."""
    with new_database() as url, with_events(url, "id bigint primary key, message text") as database:
        before = described(database.conn)
        install_in(database.conn)
        assert described(database.conn) != before

        uninstall_in(database.conn, drop_embeddings=True)

        assert described(database.conn) == before
        assert database.value("select to_regnamespace('listener')") is None


def test_uninstall_keeps_the_embeddings_unless_told_otherwise(database: Database) -> None:
    """Vectors cost hours; dropping them is a choice."""
    database.insert("a")
    with serving(database):
        database.wait_for_rest()

    uninstall_in(database.conn, drop_embeddings=False)

    assert len(database.embedded()) == 1
    install_in(database.conn)
    database.assert_invariant()


def test_the_command_keeps_the_embeddings_and_drops_them_later(
    database: Database, tmp_path: Path
) -> None:
    """Only where it is told to; with nothing else left to take out, too."""
    settings = replace(database.owner, reports_dir=tmp_path)
    database.insert("a")
    serve_once(database)

    listener(settings, "uninstall")
    assert database.value("select count(*) from public.event_embeddings") == 1

    listener(settings, "uninstall", "--drop-embeddings")
    assert database.value("select to_regclass('public.event_embeddings')") is None


def test_the_report_of_an_install_keeps_the_text_of_before(
    database: Database, tmp_path: Path
) -> None:
    """It may have been written by hand, and is gone."""
    listener(replace(database.owner, reports_dir=tmp_path), "install", "--columns", "severity")

    (report,) = tmp_path.glob("*_install.md")
    assert "embedding_input was:" in report.read_text()


def test_pgvector_in_another_schema_is_found(new_database: NewDatabase) -> None:
    """Supabase keeps it in `extensions`."""
    with new_database() as url, with_events(url, "id bigint primary key, message text") as database:
        database.rows("create schema extensions")
        database.rows("create extension vector schema extensions")
        install_in(database.conn)
        database.rows("insert into public.iot_events values (1, 'a')")
        with serving(database):
            database.wait_for_rest()

        found = database.rows(
            "select event_id from listener.nearest((select embedding from "
            "public.event_embeddings), %s, 1)",
            TinyEmbedder.fingerprint,
        )
        assert found == [(1,)]


def test_a_role_without_superuser_installs_runs_and_uninstalls(
    new_database: NewDatabase,
) -> None:
    """The owner of the table is enough where the extension is there."""
    with new_database() as url, connect(Settings(database_url=url), "admin") as admin:
        admin.execute("create extension vector")
        with creator(admin, "plain_owner", "login nosuperuser nocreaterole"):
            plain = url.replace("postgres@", "plain_owner@")
            with with_events(plain, "id bigint primary key, message text") as database:
                plan = install_in(database.conn)
                database.rows("insert into public.iot_events values (1, 'a')")
                with serving(database):
                    database.wait_for_rest()
                database.assert_invariant()
                uninstall_in(database.conn, drop_embeddings=True)

    assert any("can't create role" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("trap", "named"),
    [
        (
            "create schema listener; create view listener.applied as select 1 / 0 as file, "
            "null as digest, null as columns; grant usage on schema listener to public; "
            "grant select on listener.applied to public",
            "schema listener|listener.applied",
        ),
        (
            "create table public.event_embeddings (event_id bigint primary key, "
            "embedding vector(384), model text, content_hash bytea, embedded_at timestamptz)",
            "public.event_embeddings",
        ),
    ],
)
def test_what_a_stranger_has_put_in_our_place_is_refused_unread(
    new_database: NewDatabase, trap: str, named: str
) -> None:
    """Its views, triggers and functions would run with the rights of who installs."""
    with new_database() as url, connect(Settings(database_url=url), "admin") as admin:
        admin.execute("create extension vector")
        with (
            creator(admin, "stranger"),
            with_events(url, "id bigint primary key, message text") as database,
        ):
            database.rows("set role stranger")
            database.rows(trap)
            database.rows("reset role")

            with pytest.raises(SchemaError, match=f"^({named}) belongs to a role"):
                install_in(database.conn)


def test_a_function_that_a_stranger_has_put_into_our_schema_is_refused(
    new_database: NewDatabase,
) -> None:
    """It would run with the rights of who installs."""
    with (
        new_database() as url,
        connect(Settings(database_url=url), "admin") as admin,
        role(admin, "stranger") as stranger,
        with_events(url, "id bigint primary key, message text") as database,
    ):
        database.rows("create extension vector")
        database.rows(
            f"create schema listener; grant usage, create on schema listener to {stranger}"
        )
        database.rows(f"set role {stranger}")
        database.rows(
            "create function listener.embedding_input(event public.iot_events) returns text "
            "language plpgsql as $$ begin raise exception 'it ran'; end $$"
        )
        database.rows("reset role")

        with pytest.raises(SchemaError, match=r"^listener\.embedding_input belongs to a role"):
            install_in(database.conn)


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("waiting", "view listener.waiting as select 1 / 0 as event_id"),
        ("waiting", "materialized view listener.waiting as select 1 as event_id"),
        ("lease_token", "sequence listener.lease_token"),
    ],
)
def test_what_a_stranger_has_put_into_our_schema_is_refused_unread(
    new_database: NewDatabase, name: str, made: str
) -> None:
    """Also where the schema is the installer's own, and open to others."""
    with new_database() as url, connect(Settings(database_url=url), "admin") as admin:
        admin.execute("create extension vector")
        with (
            role(admin, "stranger"),
            with_events(url, "id bigint primary key, message text") as database,
        ):
            database.rows("create schema listener")
            database.rows("grant usage, create on schema listener to stranger")
            database.rows("set role stranger")
            database.rows(f"create {made}")
            database.rows("reset role")

            with pytest.raises(SchemaError, match=rf"^listener\.{name} belongs to a role"):
                install_in(database.conn)


def test_what_a_superuser_makes_anew_belongs_to_who_installed_first(
    new_database: NewDatabase,
) -> None:
    """Whose functions use it, and who does the next upgrade."""
    with new_database() as url, connect(Settings(database_url=url), "admin") as admin:
        admin.execute("create extension vector")
        with creator(admin, "first", "login"):
            own = url.replace("postgres@", "first@")
            with with_events(own, "id bigint primary key, message text") as database:
                install_in(database.conn)
                for damage in (
                    "drop table listener.queue, listener.change, public.event_embeddings cascade",
                    "drop function listener.input_of cascade",
                    "drop sequence listener.lease_token",
                ):
                    database.rows(damage)

                install_in(admin)

                owners = (
                    "select relowner::regrole::text from pg_class where relkind in ('r', 'v', 'S') "
                    "and (relnamespace = 'listener'::regnamespace or relname = 'event_embeddings') "
                    "union select proowner::regrole::text from pg_proc "
                    "where pronamespace = 'listener'::regnamespace "
                    "and prorettype <> 'trigger'::regtype"
                )
                assert database.rows(owners) == [("first",)]
                admin.execute("grant listener_owner to first")
                database.rows("update listener.applied set digest = 'of an earlier version'")
                install_in(database.conn)


def test_default_privileges_give_nobody_a_way_past_row_level_security(
    new_database: NewDatabase,
) -> None:
    """Nor to have a trigger of their own run when an event is deleted."""
    rights = (
        "select c.relname, a.privilege_type from pg_class c cross join aclexplode(c.relacl) a "
        "join pg_roles r on r.oid = a.grantee where r.rolname = 'monitor' order by 1, 2"
    )
    with (
        new_database() as url,
        connect(Settings(database_url=url), "admin") as admin,
        role(admin, "monitor"),
    ):
        for kind in ("tables", "sequences", "functions", "schemas"):
            admin.execute(f"alter default privileges grant all on {kind} to monitor".encode())
        with with_events(url, "id bigint primary key, message text") as database:
            database.rows("revoke all on public.iot_events from monitor")
            install_in(database.conn)

            # Row-level security is about these; `listener.status` is for whom you let watch.
            assert {
                right for table, right in database.rows(rights) if table == "event_embeddings"
            } <= {"SELECT", "INSERT", "UPDATE", "DELETE", "MAINTAIN"}
            assert {table for table, _ in database.rows(rights)} == {
                "event_embeddings",
                "status",
            }
            assert not database.value("select has_schema_privilege('monitor', 'listener', 'usage')")
            assert not database.rows(
                "select p.oid::regprocedure from pg_proc p cross join aclexplode(p.proacl) a "
                "where p.pronamespace = 'listener'::regnamespace and a.grantee = 'monitor'::regrole"
            )


_OVERLOADS = """
create function public.nextval(text) returns bigint language sql as 'select 1/0::bigint';
create function public.convert_to(text, text) returns bytea
  language sql as 'select (1/0)::text::bytea';
create function public.format_type(oid, text) returns text language sql as 'select (1/0)::text';
create function public.has_database_privilege(name, text) returns boolean
  language sql as 'select 1/0 > 0';
create function public.unnest(text[]) returns setof text language sql as 'select (1/0)::text';
create function public.unnest(bigint[]) returns setof bigint language sql as 'select 1/0::bigint';
"""


def test_no_function_that_somebody_made_in_public_is_taken_for_one_of_postgres(
    new_database: NewDatabase,
) -> None:
    """One that fits its arguments better would run with the rights of who installs or serves."""
    with new_database() as url, with_events(url, "id bigint primary key, message text") as database:
        database.rows(_OVERLOADS)

        install_in(database.conn)
        database.rows("insert into public.iot_events values (1, 'a')")
        serve_once(database)

        assert set(database.embedded()) == {1}


# For every pair of types that Postgres would have to convert.
_OPERATORS = """
do $$
declare
  v_types constant text[] :=
    '{oid,regclass,regnamespace,regtype,regrole,int2,int4,int8,float4,float8,numeric,name,text}';
  v_left text;
  v_right text;
  v_operator text;
begin
  set local search_path = '';
  for v_left, v_right in select l, r from unnest(v_types) l, unnest(v_types) r loop
    execute format(
      'create function public.planted(%1$s, %2$s) returns boolean language plpgsql as '
      '$f$ begin raise exception ''planted: %1$s, %2$s''; end $f$', v_left, v_right
    );
    for v_operator in
      select o from unnest('{=,<>,<,>,<=,>=,+,-,*,/,^,||}'::text[]) o
      except
      select oprname from pg_operator
      where oprleft = v_left::regtype and oprright = v_right::regtype
    loop
      execute format(
        'create operator public.%s (leftarg = %s, rightarg = %s, function = public.planted)',
        v_operator, v_left, v_right
      );
    end loop;
  end loop;
end
$$
"""


def test_no_operator_that_somebody_made_in_public_is_taken_for_one_of_postgres(
    new_database: NewDatabase, static_model: Path, tmp_path: Path
) -> None:
    """It would run with the rights of who installs, serves or looks, and be part of our views."""
    with new_database() as url, with_events(url, "id bigint primary key, message text") as database:
        settings = Settings(
            database_url=url,
            embedding_model=str(static_model),
            reports_dir=tmp_path,
            max_attempts=1,
        )
        database.rows(_OPERATORS)
        listener(settings, "install")
        listener(settings, "install", "--columns", "message")
        replace_input(database, "raise exception 'no'")
        database.rows("insert into public.iot_events values (1, 'a'), (2, 'bad')")

        for command in (
            ["run", "--once"],
            ["check"],
            ["status"],
            ["show", "1"],
            ["search", "a"],
            ["report"],
            ["retry", "--all"],
            ["backfill", "--all", "--work"],
        ):
            listener(settings, *command)

        assert database.rows("select event_id from public.event_embeddings") == [(1,)]
        (queued,) = database.queue()
        assert "no" in queued.error
        with connect(settings, "listener-test") as conn:
            # Behind a transaction pooler no session is the service's own.
            queue = Queue(conn, replace(settings, max_attempts=2), None)
            database.rows("insert into public.iot_events values (3, 'c')")
            for end in (queue.release, partial(queue.fail, reason="why")):
                claim = queue.claim(1)
                assert claim is not None
                end(claim.lease, claim.event_ids)
            queue.notify()
        listener(settings, "uninstall", "--drop-embeddings")


def test_the_remedy_for_a_missing_right_can_be_run_as_it_stands(new_database: NewDatabase) -> None:
    """Also for a name that has to be quoted."""
    with new_database() as url, connect(Settings(database_url=url), "admin") as admin:
        admin.execute("create extension vector")
        with role(admin, '"app-owner"', "login nosuperuser"):
            admin.execute("create table public.iot_events (id bigint primary key, message text)")
            admin.execute('alter table public.iot_events owner to "app-owner"')
            settings = Settings(database_url=url.replace("postgres@", "app-owner@"))
            with connect(settings, "listener-install") as conn:
                for _ in range(2):
                    with pytest.raises(SchemaError, match="may not create") as caught:
                        require_installable(read_facts(conn))
                    admin.execute(str(caught.value).partition("; ")[2].encode())
                require_installable(read_facts(conn))


def test_a_role_that_creates_roles_gives_the_trigger_functions_away(
    new_database: NewDatabase,
) -> None:
    """As on Supabase: no superuser, but createrole."""
    with new_database() as url, connect(Settings(database_url=url), "admin") as admin:
        admin.execute("create extension vector")
        owner_existed = (
            admin.execute("select from pg_roles where rolname = 'listener_owner'").fetchone()
            is not None
        )
        with creator(admin, "managing", "login nosuperuser createrole"):
            if owner_existed:
                admin.execute("grant listener_owner to managing with admin option")
            with with_events(
                url.replace("postgres@", "managing@"), "id bigint primary key, message text"
            ) as database:
                install_in(database.conn)
                database.rows("insert into public.iot_events values (1, 'a')")
                owners = database.rows(
                    "select distinct proowner::regrole::text from pg_proc where pronamespace = "
                    "'listener'::regnamespace and prorettype = 'trigger'::regtype"
                )
                with serving(database):
                    database.wait_for_rest()

    assert owners == [("listener_owner",)]


def test_after_a_change_of_owner_a_repair_names_the_grant_that_it_needs(
    database: Database,
) -> None:
    """The trigger functions belong to a role that the new owner is no member of."""
    with role(database.conn, "heir", "login nosuperuser") as heir:
        database.rows(f"grant usage on schema listener to {heir}")
        database.rows(f"grant select on listener.applied to {heir}")
        url = database.owner.database_url.replace("postgres@", f"{heir}@")
        with connect(Settings(database_url=url), "listener-install") as conn:
            assert install.plan_install(conn, read_facts(conn), None).steps == ()
            database.rows("alter table public.iot_events disable trigger listener_inserted")

            with pytest.raises(SchemaError, match='grant listener_owner to "heir"'):
                install.plan_install(conn, read_facts(conn), None)

            database.rows(f"grant listener_owner to {heir}")
            assert install.plan_install(conn, read_facts(conn), None).steps


def test_a_writer_without_any_right_on_the_schema_inserts_and_updates(database: Database) -> None:
    """Also with a search path of its own making."""
    database.rows("drop role if exists device")
    with role(database.conn, "device"):
        database.rows("grant insert, update, select on public.iot_events to device")
        database.rows("create schema hostile")
        for function in ("now()", "nextval(text)", "pg_notify(text, text)", "sha256(bytea)"):
            database.rows(
                f"create function hostile.{function} returns int language sql as 'select 1/0'"
            )
        database.rows("create table hostile.new_events (id bigint)")
        database.rows("create table hostile.change (event_id bigint)")
        database.rows("grant usage on schema hostile to device")
        with database.session() as writer:
            writer.execute("set role device")
            writer.execute("set search_path = hostile, pg_catalog, pg_temp")
            writer.execute(
                "insert into public.iot_events (device_id, event_type, severity, message) "
                "values ('d', 't', 's', 'm')"
            )
            writer.execute("update public.iot_events set message = 'n'")
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                writer.execute("select listener.queue_inserted()")

    assert database.value("select count(*) from listener.change") == 2


@pytest.mark.parametrize(
    ("statement", "says"),
    [
        ("drop table public.iot_events", "no table public.iot_events"),
        ("alter table public.iot_events set unlogged", "iot_events is unlogged"),
        ("create table older () inherits (public.iot_events)", "child or partition of table older"),
        (
            "create table every (id bigint primary key, message text) partition by list (id); "
            "alter table every attach partition public.iot_events for values in (1)",
            "child or partition of table every",
        ),
        ("set default_transaction_read_only = on", "the server is read-only"),
        ("alter table public.iot_events alter id type numeric", "iot_events.id is numeric"),
        ("alter table public.iot_events drop constraint iot_events_pkey", "unique constraint"),
        (
            "create table public.event_embeddings (event_id bigint, embedding vector(768))",
            r"vector\(768\)",
        ),
        (
            "create table public.event_embeddings (id bigint, embedding vector(384), model text)",
            "has no column event_id, content_hash, embedded_at",
        ),
        (
            "create table public.event_embeddings (event_id bigint, embedding vector(384), "
            "model text, content_hash bytea, embedded_at timestamptz)",
            "event_embeddings.event_id has no primary key",
        ),
    ],
)
def test_what_makes_an_install_impossible_is_said_before_anything_is_done(
    new_database: NewDatabase, statement: str, says: str
) -> None:
    """A message names the subject, what was found and what to do."""
    with new_database() as url, with_events(url, "id bigint primary key, message text") as database:
        database.rows("create extension vector")
        database.rows(statement)

        with pytest.raises(SchemaError, match=says):
            install_in(database.conn)

        assert database.value("select to_regnamespace('listener')") is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"server_version": 140009}, "PostgreSQL 14; 15 is the oldest"),
        ({"encoding": "LATIN1"}, "is encoded in LATIN1; UTF8 is needed"),
        ({"vector_schema": None, "vector_available": False}, "pgvector is not on this server"),
        ({"events_kind": "v"}, "is not a table"),
        ({"event_id_types": ("integer",)}, "event_id in the listener's tables is integer"),
    ],
)
def test_what_no_server_of_the_tests_has_makes_an_install_impossible_too(
    database: Database, change: dict[str, Any], says: str
) -> None:
    """As it would be read there."""
    facts = read_facts(database.conn)
    require_installable(facts)

    with pytest.raises(SchemaError, match=says):
        require_installable(replace(facts, **change))


@pytest.mark.parametrize(
    "key",
    [
        "alter table public.event_embeddings add primary key (event_id, model)",
        "alter table public.event_embeddings add unique (event_id) deferrable",
        "create unique index on public.event_embeddings (event_id) where model = 'a'",
    ],
    ids=["of two columns", "deferrable", "of some rows"],
)
def test_a_key_of_embeddings_that_no_write_can_rely_on_is_refused(
    database: Database, key: str
) -> None:
    """`on conflict (event_id)` fails without one of its own, at each event."""
    database.rows("alter table public.event_embeddings drop constraint event_embeddings_pkey")
    database.rows(key)

    with pytest.raises(SchemaError, match="event_id has no primary key of its own"):
        require_installable(read_facts(database.conn))


@pytest.mark.parametrize(
    "key",
    ["add primary key (id, device_id)", "add primary key (id) deferrable"],
    ids=["of two columns", "deferrable"],
)
def test_a_key_of_events_that_no_foreign_key_can_refer_to_is_refused(
    database: Database, key: str
) -> None:
    """With the remedy, and not with whatever the server says in the midst of the install."""
    database.rows("drop table public.event_embeddings cascade")
    database.rows(f"alter table public.iot_events drop constraint iot_events_pkey, {key}")

    with pytest.raises(SchemaError, match="no primary key or unique constraint of its own"):
        require_installable(read_facts(database.conn))


def test_a_key_under_which_different_ids_are_equal_is_refused(new_database: NewDatabase) -> None:
    """An event that takes another spelling of its id would have two embeddings."""
    with new_database() as url, connect(Settings(database_url=url), "admin") as admin:
        admin.execute('create collation public.blurred from "C"')
        with with_events(url, "id text collate public.blurred primary key, message text"):
            # By hand, because the server may lack ICU, which alone makes one.
            admin.execute("set allow_system_table_mods = on")
            admin.execute(
                "update pg_collation set collisdeterministic = false where collname = 'blurred'"
            )

            with pytest.raises(SchemaError, match="its collation is nondeterministic"):
                require_installable(read_facts(admin))


@pytest.mark.parametrize("schema", ["public", "extensions"])
def test_the_default_text_leaves_out_keys_ids_times_and_what_nobody_reads(
    new_database: NewDatabase, schema: str
) -> None:
    """And empty values; several columns are named, a line each."""
    columns = "id bigint primary key, device_id text, kind text, note text, seen timestamptz"
    with new_database() as url, with_events(url, columns) as database:
        database.rows(f"create schema if not exists {schema}")
        database.rows(f"create extension vector schema {schema}")
        # PostGIS has a type of that name.
        database.rows(f"create domain {schema}.geometry as text")
        database.rows(
            "alter table public.iot_events add photo bytea, add photos bytea[], "
            f"add other {schema}.vector(2), add place {schema}.geometry"
        )
        install_in(database.conn)
        database.rows(
            "insert into public.iot_events "
            "select v.id, 'd', v.kind, 'n', now(), 'photo', '{photo}', '[1,2]', 'POINT(1 2)' "
            "from (values (1, 'k'), (2, '')) as v (id, kind)"
        )

        texts = database.rows("select listener.embedding_input(e) from public.iot_events e")

    assert texts == [("kind: k\nnote: n",), ("note: n",)]


def test_the_default_text_leaves_out_what_refers_to_another_table(
    new_database: NewDatabase,
) -> None:
    """A number there says nothing to a model of language."""
    columns = "id bigint primary key, site integer references public.site (number), message text"
    with new_database() as url, connect(Settings(database_url=url), "admin") as admin:
        admin.execute("create table public.site (number integer primary key)")
        with with_events(url, columns) as database:
            install_in(database.conn)

            database.rows("insert into public.site values (7)")
            database.rows("insert into public.iot_events values (1, 7, 'hot')")
            text = "select listener.embedding_input(e) from public.iot_events e"
            assert database.value(text) == "hot"


def test_a_virtual_generated_column_is_embedded_as_it_reads_and_fails_no_writer(
    new_database: NewDatabase,
) -> None:
    """PostgreSQL 18: a trigger can't read such rows, so each update counts as a change."""
    with (
        new_database() as url,
        with_events(url, "id bigint primary key, device_id text") as database,
    ):
        if database.conn.info.server_version < 180000:
            pytest.skip("before PostgreSQL 18 there are none")
        database.rows(
            "alter table public.iot_events add summary text generated always as "
            "('from ' || device_id) virtual"
        )
        install_in(database.conn)
        with serving(database) as service:
            for device in ("a", "b"):
                database.rows(
                    "insert into public.iot_events values (1, %s) "
                    "on conflict (id) do update set device_id = excluded.device_id",
                    device,
                )
                database.wait_for_rest()

        assert service.embedder.encoded == ["from a", "from b"]
        database.assert_invariant()


def test_chosen_columns_are_kept_by_the_next_install_and_one_column_stands_bare(
    new_database: NewDatabase,
) -> None:
    """--columns once is enough."""
    with (
        new_database() as url,
        with_events(url, 'id bigint primary key, kind text, "odd \'""name" integer') as database,
    ):
        install_in(database.conn, ["odd '\"name"])
        database.rows("insert into public.iot_events values (1, 'k', 7)")

        assert install_in(database.conn).steps == ()

        assert database.value("select listener.embedding_input(e) from public.iot_events e") == "7"
        with pytest.raises(SchemaError, match="no column nonsense"):
            install_in(database.conn, ["nonsense"])


def test_a_column_with_a_comma_in_its_name_can_be_chosen(
    new_database: NewDatabase, tmp_path: Path
) -> None:
    """In double quotes."""
    columns = 'id bigint primary key, "temp, °C" text, message text'
    with new_database() as url, with_events(url, columns) as database:
        settings = Settings(database_url=url, reports_dir=tmp_path / "reports")

        listener(settings, "install", "--columns", 'message, "temp, °C"')

        database.rows("insert into public.iot_events values (1, '21', 'a')")
        text = database.value("select listener.embedding_input(e) from public.iot_events e")
    assert text == "message: a\ntemp, °C: 21"


def test_an_install_that_changes_the_text_says_what_is_left_to_do(
    new_database: NewDatabase, tmp_path: Path
) -> None:
    """The events that are there keep the vectors of their former text until then."""
    columns = "id bigint primary key, kind text, message text"
    with new_database() as url, with_events(url, columns):
        settings = Settings(database_url=url, reports_dir=tmp_path / "reports")

        first = listener(settings, "install", "--columns", "kind").stderr
        second = listener(settings, "install", "--columns", "message").stderr

    assert "the embedded text changed" not in first
    assert "the embedded text changed; run `listener backfill --all`" in second


def test_a_replaced_embedding_input_is_left_alone(database: Database) -> None:
    """The text is the operator's choice."""
    database.rows(
        "create or replace function listener.embedding_input(event public.iot_events) "
        "returns text language sql stable as $$ select event.severity $$"
    )

    plan = install_in(database.conn)

    assert plan.steps == ()
    assert any("replaced by you" in note for note in plan.notes)
    database.insert("a")
    assert database.value("select listener.embedding_input(e) from public.iot_events e") == "info"


def test_a_dropped_index_is_made_again_by_install(database: Database) -> None:
    """As a clean-up of unused ones leaves it."""
    database.rows("drop index listener.queue_lane_due_at_idx")

    install_in(database.conn)

    assert database.value("select to_regclass('listener.queue_lane_due_at_idx')") is not None
    assert install_in(database.conn).steps == ()


def test_a_table_in_the_place_of_event_embeddings_may_be_renamed(database: Database) -> None:
    """As the message says; its key keeps the name that it has."""
    database.rows("drop table public.event_embeddings cascade")
    database.rows(
        "create table public.event_embeddings "
        "(event_id bigint primary key, embedding public.vector(768))"
    )
    with pytest.raises(SchemaError, match="rename that table"):
        install_in(database.conn)
    database.rows("alter table public.event_embeddings rename to old_embeddings")

    install_in(database.conn)

    install.verify(database.conn)


def test_a_table_of_the_operators_in_the_place_of_event_embeddings_is_taken_over(
    database: Database,
) -> None:
    """As one that was rebuilt by hand; until then the service would write into the former one."""
    constraint = "constraint event_embeddings_event_id_fkey"
    for statement in (
        "alter table public.event_embeddings rename to old_embeddings",
        f"alter table public.old_embeddings drop {constraint}",
        "create table public.event_embeddings (like public.old_embeddings including all)",
        f"alter table public.event_embeddings add {constraint} "
        "foreign key (event_id) references public.iot_events on delete cascade",
    ):
        database.rows(statement)
    with pytest.raises(SchemaError, match="a view of schema listener"):
        install.verify(database.conn)

    install_in(database.conn)

    database.insert("a")
    serve_once(database)
    assert len(database.embedded()) == 1


@pytest.mark.parametrize(
    "damage",
    [
        "alter table public.iot_events disable trigger listener_inserted",
        "drop trigger listener_updated on public.iot_events",
        "alter table public.iot_events enable replica trigger listener_inserted",
    ],
)
def test_a_disabled_or_dropped_trigger_is_put_right_by_install(
    database: Database, damage: str
) -> None:
    """And until then, verify says so."""
    database.rows(damage)
    with pytest.raises(SchemaError, match="triggers"):
        install.verify(database.conn)

    plan = install_in(database.conn)

    assert "007_triggers.sql" in {step.file for step in plan.steps}
    assert install_in(database.conn).steps == ()


@pytest.mark.parametrize(
    "swap",
    [
        (
            "alter table public.iot_events rename to iot_events_old",
            "create table public.iot_events (like public.iot_events_old including all)",
        ),
        ("drop table public.iot_events cascade", sql_text("demo.sql")),
    ],
    ids=["renamed", "dropped"],
)
def test_another_table_of_the_name_is_taken_over_by_an_install(
    static: Database, swap: tuple[str, str]
) -> None:
    """As after a migration that fills a new table and gives it the name of the old one."""
    first, _ = static.insert("first", "second")
    listener(static.settings, "run", "--once")
    for statement in swap:
        static.rows(statement)
    static.rows("alter table public.iot_events alter id restart with 100")
    static.insert_as(first, "first")
    with pytest.raises(SchemaError, match="listener install"):
        install.verify(static.conn)

    plan = install_in(static.conn)

    assert any("made anew" in note for note in plan.notes)
    assert install_in(static.conn).steps == ()
    (third,) = static.insert("third")
    listener(static.settings, "backfill", "--all", "--work")
    assert set(static.embedded()) == {first, third}
    policy = "select pg_get_expr(polqual, polrelid) from pg_policy"
    assert "FROM iot_events e" in static.value(policy)
    static.rows("delete from public.iot_events")
    assert static.embedded() == {}


def test_where_another_table_took_the_name_the_old_one_may_go_and_events_be_renumbered(
    new_database: NewDatabase,
) -> None:
    """Nothing of ours holds on to the one, and the key is the same on the other."""
    columns = "id bigint primary key, message text"
    with new_database() as url, with_events(url, columns) as database:
        install_in(database.conn)
        database.rows(
            "alter table public.event_embeddings rename constraint event_embeddings_event_id_fkey "
            "to as_a_tool_names_it"
        )
        database.rows("alter table public.iot_events rename to iot_events_old")
        database.rows(f"create table public.iot_events ({columns})")
        install_in(database.conn)
        database.rows("insert into public.iot_events values (1, 'a')")
        serve_once(database)

        database.rows("drop table public.iot_events_old")
        database.rows("update public.iot_events set id = 2")

        assert set(database.embedded()) == {2}


@pytest.mark.parametrize("is_partitioned", [False, True])
def test_a_table_that_had_the_name_keeps_no_trigger(
    new_database: NewDatabase, is_partitioned: bool
) -> None:
    """Its rows are no events; and where its columns are renamed its writers would be refused."""
    columns = "id bigint primary key, message text"
    with new_database() as url, with_events(url, columns) as database:
        if is_partitioned:
            database.rows("drop table public.iot_events")
            database.rows(f"create table public.iot_events ({columns}) partition by hash (id)")
            database.rows(
                "create table public.part partition of public.iot_events "
                "for values with (modulus 1, remainder 0)"
            )
        install_in(database.conn)
        database.rows("alter table public.iot_events rename to iot_events_old")
        database.rows(f"create table public.iot_events ({columns})")

        install_in(database.conn)

        database.rows("alter table public.iot_events_old rename id to number")
        database.rows("insert into public.iot_events_old values (1, 'a')")
        database.rows("insert into public.iot_events values (2, 'b')")
        assert [row.event_id for row in database.queue()] == [2]


def test_a_foreign_key_that_does_not_cascade_is_put_right_by_install(database: Database) -> None:
    """With it, an event that is embedded could not be deleted; one of the operator's own stays."""
    database.rows("create table public.models (model text primary key)")
    database.rows(
        "alter table public.event_embeddings "
        "add constraint known foreign key (model) references public.models"
    )
    database.rows(
        "alter table public.event_embeddings drop constraint event_embeddings_event_id_fkey, "
        "add constraint event_embeddings_event_id_fkey foreign key (event_id) "
        "references public.iot_events (id)"
    )
    with pytest.raises(SchemaError, match="the foreign key of event_embeddings"):
        install.verify(database.conn)

    install_in(database.conn)

    database.rows("alter table public.event_embeddings drop constraint known")
    database.insert("a")
    serve_once(database)
    database.rows("delete from public.iot_events")
    assert database.embedded() == {}


@pytest.mark.parametrize("ddl", ["rename column message to note", "drop column message"])
def test_a_column_that_is_gone_is_named_and_the_events_wait_for_a_new_install(
    static: Database, ddl: str
) -> None:
    """Writers go on; exit 3 of the service, which check explains and `install` puts right."""
    static.rows(f"alter table public.iot_events {ddl}")
    static.rows(
        "insert into public.iot_events (device_id, event_type, severity) values ('p', 't', 'w')"
    )

    run, check = (listener(static.settings, one, check=False) for one in ("run", "check"))
    refused = listener(static.owner, "install", check=False)
    listener(static.owner, "install", "--columns", "event_type,severity")
    listener(static.settings, "run", "--once")

    assert (run.returncode, check.returncode) == (3, 3)
    assert "run `listener install --columns" in run.stderr
    assert "listener.embedding_input can't be evaluated (" in check.stdout
    assert refused.returncode == 3
    assert "iot_events has no column message" in refused.stderr
    assert len(static.embedded()) == 1


def test_an_id_of_another_type_is_refused_with_the_remedy(database: Database) -> None:
    """The tables that were made for the old type can't follow by themselves."""
    database.rows("alter table public.iot_events rename to iot_events_old")
    database.rows("create table public.iot_events (id uuid primary key, message text)")

    with pytest.raises(SchemaError, match=r"id is uuid, .* is bigint; run `listener uninstall`"):
        install_in(database.conn)


def test_the_type_of_id_can_be_changed_and_the_embeddings_stay(new_database: NewDatabase) -> None:
    """An integer runs out: uninstall, alter both tables, install."""
    (alter,) = re.findall(r"```sql\n(begin;.*?commit;)\n```", README, re.DOTALL)
    with new_database() as url, with_events(url, "id integer primary key, message text") as events:
        install_in(events.conn)
        events.rows("insert into public.iot_events values (1, 'old')")
        with serving(events):
            events.wait_for_rest()

        uninstall_in(events.conn, drop_embeddings=False)
        events.rows(alter)
        install_in(events.conn)
        events.rows("insert into public.iot_events values (5000000000, 'new')")
        with serving(events) as service:
            events.wait_for_rest()

        assert service.embedder.encoded == ["new"]
        assert set(events.embedded()) == {1, 5_000_000_000}


def test_rows_written_as_a_replica_are_queued(database: Database) -> None:
    """Replication skips ordinary triggers, not ours."""
    database.rows("set session_replication_role = replica")

    ids = database.insert("a")

    assert [row.event_id for row in database.queue()] == ids


def test_the_command_reports_and_a_dry_run_only_prints(
    new_database: NewDatabase, tmp_path: Path
) -> None:
    """Before, steps, after and undo are on file; a dry run leaves no trace."""
    with new_database() as url, with_events(url, "id bigint primary key, message text") as database:
        settings = Settings(database_url=url, reports_dir=tmp_path / "reports")

        dry = listener(settings, "install", "--dry-run")
        assert "create or replace trigger" in dry.stdout
        assert database.value("select to_regnamespace('listener')") is None
        assert not settings.reports_dir.exists()

        first, second = listener(settings, "install"), listener(settings, "install")

        assert "installed" in first.stderr
        assert "nothing to do" in second.stderr
        (report,) = settings.reports_dir.iterdir()
        for title in ("## Before", "## Steps", "## After", "## Undo"):
            assert title in report.read_text()

        listener(settings, "uninstall")

        (report,) = settings.reports_dir.glob("*_uninstall.md")
        undo = report.read_text().partition("## Undo")[2]
        assert (
            "embedding_input was:\n\n"
            '```\nbegin\n  return event."message"::pg_catalog.text;\nend\n```'
        ) in undo
