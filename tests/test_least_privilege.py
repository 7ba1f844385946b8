"""The service can do what it must, and nothing else; readers see what they may see."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from uuid import UUID

import psycopg
import pytest

from listener import install, queries
from listener.catalogue import read_facts
from listener.claim import EventId
from listener.config import Settings
from listener.database import Connection, connect
from listener.embedded import Server
from listener.errors import SchemaError
from listener.upkeep import delete_orphans
from tests.harness import (
    SERVICE_ROLE,
    Database,
    NewDatabase,
    RunningService,
    is_asleep,
    listener,
    role,
    serve_once,
    serving,
    wait_until,
)
from tests.own_server import MakeServer
from tests.statements import PARAMETERS, STATEMENTS
from tests.test_docs import ARCHITECTURE, table
from tests.test_install import install_in, uninstall_in, with_events

# Every right on an object of ours, but for those of its owner.
GRANTS = """
with granted as (
  select 'schema ' || n.nspname as object, n.nspowner as owner, null as part, a.*
  from pg_namespace n, aclexplode(n.nspacl) a
  where n.nspname = 'listener'
  union all
  select c.oid::regclass::text, c.relowner, null, a.*
  from pg_class c, aclexplode(c.relacl) a
  where c.relnamespace = 'listener'::regnamespace
    or c.oid in ('public.iot_events'::regclass, 'public.event_embeddings'::regclass)
  union all
  select c.oid::regclass::text, c.relowner, t.attname, a.*
  from pg_class c join pg_attribute t on t.attrelid = c.oid, aclexplode(t.attacl) a
  where c.relnamespace in ('listener'::regnamespace, 'public'::regnamespace)
  union all
  select 'listener.' || p.proname, p.proowner, null, a.*
  from pg_proc p, aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a
  where p.pronamespace = 'listener'::regnamespace
)
select
  object,
  case when grantee = 0 then 'public' else grantee::regrole::text end as role,
  lower(privilege_type) || coalesce(' (' || part || ')', '') as right_name
from granted
where grantee <> owner
"""


def documented() -> set[tuple[str, str, str]]:
    """The rows of the table of rights, one for each right."""
    return {
        (target.strip("`"), role.strip("`"), right.strip())
        for target, role, rights, _ in table(ARCHITECTURE, "Object")
        for right in rights.split(",")
    }


@contextmanager
def acting_as(database: Database, name: str) -> Iterator[Connection]:
    with database.session() as conn:
        conn.execute(f"set role {name}".encode())
        yield conn


def seen_by(database: Database, name: str) -> list[int]:
    with acting_as(database, name) as conn:
        rows = conn.execute("select event_id from public.event_embeddings order by 1").fetchall()
    return [event_id for (event_id,) in rows]


# --- the worker ----------------------------------------------------------------------------------


def test_the_documented_rights_are_those_in_the_catalogue(database: Database) -> None:
    """Of every role but the owners, on every object of ours; none is for everybody."""
    granted = set(database.rows(GRANTS))

    assert granted == documented()


def refused(conn: Connection) -> set[str]:
    """The names of the runtime statements for which the worker lacks a right."""
    lacking = set()
    for name, text in STATEMENTS.items():
        try:
            with conn.transaction(force_rollback=True):
                conn.execute(text.encode(), PARAMETERS)
        except psycopg.errors.InsufficientPrivilege:
            lacking.add(name)
    return lacking


def test_every_statement_may_be_executed_and_needs_each_right(database: Database) -> None:
    """Exactly what the service uses: with any one right less, some statement fails."""
    ids = database.insert("a", "b")
    database.rows("delete from listener.change where event_id = %s", ids[0])
    # In the lease of PARAMETERS, so that its text is read.
    database.rows("insert into listener.queue (event_id, lease) values (%s, 1)", ids[0])
    rights = [(o, r) for o, role_name, r in documented() if role_name == "listener_worker"]
    signatures = database.rows(
        "select 'listener.' || proname, 'function ' || oid::regprocedure from pg_proc "
        "where pronamespace = 'listener'::regnamespace"
    )
    names = dict(signatures)
    with database.service_session() as conn:
        assert refused(conn) == set()

        for target, right in rights:
            name = names.get(target, target if " " in target else f"table {target}")
            database.rows(f"revoke {right} on {name} from listener_worker")
            assert refused(conn), f"{right} on {target} is not needed"
            database.rows(f"grant {right} on {name} to listener_worker")


@pytest.mark.parametrize(
    "statement",
    [
        "select from public.iot_events",
        "update public.iot_events set message = 'x'",
        "delete from public.iot_events",
        "select from public.event_embeddings",
        "truncate public.event_embeddings",
        "update listener.event set id = 2",
        "delete from listener.event",
        "insert into listener.event (id) values (2)",
        "insert into listener.change (event_id) values (1)",
        "update listener.change set event_id = 2",
        "delete from listener.applied",
        "drop table listener.queue",
        "create table listener.mine ()",
        "create function listener.mine() returns int language sql as 'select 1'",
        "select setval('listener.lease_token', 1)",
        "alter table public.iot_events disable trigger listener_inserted",
    ],
)
def test_the_worker_is_refused(database: Database, statement: str) -> None:
    """What it need not do it can't do."""
    database.insert("a")
    # Which would refuse the statement before it is asked who may.
    database.rows("alter table public.iot_events alter id drop identity")

    with (
        database.service_session() as conn,
        pytest.raises(psycopg.errors.InsufficientPrivilege),
    ):
        conn.execute(statement.encode())


def test_the_column_by_which_the_worker_locks_events_changes_none(database: Database) -> None:
    """The right to update it is the right to lock, because it is computed."""
    database.insert("a")

    with (
        database.service_session() as conn,
        pytest.raises(psycopg.errors.FeatureNotSupported, match="cannot update column"),
    ):
        conn.execute("update listener.event set input = 'x'")


def test_the_service_under_test_is_in_listener_worker_and_nothing_else(
    database: Database,
) -> None:
    """So that the rest of the suite proves that these rights suffice."""
    with serving(database):
        wait_until(lambda: is_asleep(database))
        roles = database.rows(
            "select distinct usename from pg_stat_activity "
            "where datname = current_database() and application_name like 'listener-w%%'"
        )
    attributes = database.rows(
        "select rolsuper, rolcreaterole, rolcreatedb, rolbypassrls, rolreplication "
        "from pg_roles where rolname in (%s, 'listener_worker')",
        SERVICE_ROLE,
    )
    member_of = database.rows(
        "select roleid::regrole::text from pg_auth_members where member = %s::regrole",
        SERVICE_ROLE,
    )

    assert roles == [(SERVICE_ROLE,)]
    assert attributes == [(False,) * 5] * 2
    assert member_of == [("listener_worker",)]


def test_a_write_through_the_views_is_planned_as_on_the_tables(database: Database) -> None:
    """The views vanish in the planner, whatever the tables hold."""
    database.insert(*map(str, range(2000)))
    database.rows("insert into listener.queue (event_id) select id from public.iot_events")
    database.rows("analyze")
    bare = queries.WRITE
    for view, relation in (
        ("listener.embedding", "public.event_embeddings"),
        ("listener.event e", "public.iot_events e"),
        ("e.input", "listener.input_of(e.*)"),
    ):
        assert view in bare
        bare = bare.replace(view, relation)

    def plan(conn: Connection, statement: str) -> list[str]:
        rows = conn.execute(f"explain (costs off) {statement}".encode(), PARAMETERS).fetchall()
        return [line for (line,) in rows]

    with database.service_session() as conn:
        assert plan(conn, queries.WRITE) == plan(database.conn, bare)


# Those with a name of their own; `integer`, `interval` and their like are grammar.
_TYPES = ("bool", "bytea", "int8", "json", "jsonb", "oid", "text", "timestamptz", "uuid")


@pytest.mark.parametrize(
    ("key_type", "event_id"), [("bigint", 1), ("text", "1"), ("uuid", UUID(int=1))]
)
def test_a_callers_types_do_not_get_into_what_runs_with_the_owners_rights(
    new_database: NewDatabase, key_type: str, event_id: EventId
) -> None:
    """Where no search path is set, types of the session come before those of the system."""
    columns = f"id {key_type} primary key, n int, created_at timestamptz not null default now()"
    with new_database() as url, with_events(url, columns) as database:
        database.rows("create index on public.iot_events (created_at)")
        install_in(database.conn)
        with database.session() as conn:
            caller = Database(database.settings, conn, database.owner)
            for name in _TYPES:
                caller.rows(f"create domain pg_temp.{name} as pg_catalog.{name} check (false)")
            caller.rows("insert into public.iot_events values (%s, 1)", event_id)
            caller.rows("update public.iot_events set n = 2")
            database.rows(
                "insert into public.event_embeddings (event_id, embedding, model, content_hash) "
                "select e.id, array_fill(1::real, array[384]), 'm', listener.content_hash(e.*) "
                "from public.iot_events e"
            )
            pages = caller.rows("select * from listener.page('m', null, 1, null)")
            start = f'["infinity", "{event_id}"]'
            assert caller.rows("select * from listener.page('m', %s, 1, null)", start) == pages
            assert [page[:2] for page in pages] == [(event_id, True)]
            caller.rows("select listener.nearest(null, null, 1)")
            caller.rows("select listener.latency(1)")
            caller.rows("select listener.compact()")

        assert database.value("select count(*) from listener.change") == 2


# --- readers and row-level security --------------------------------------------------------------


def hide_events(database: Database) -> None:
    """Events are for whom their device_id names."""
    database.rows("alter table public.iot_events enable row level security")
    database.rows(
        "create policy own on public.iot_events for select using (device_id = current_user)"
    )


def test_a_reader_sees_an_embedding_only_if_it_may_see_the_event(database: Database) -> None:
    """The policy of iot_events decides; the service embeds what it hides all the same."""
    hide_events(database)
    with serving(database), role(database.conn, "tenant") as tenant:
        database.insert("not theirs")
        (theirs,) = database.rows(
            "insert into public.iot_events (device_id, event_type, severity) "
            "values ('tenant', 't', 's') returning id"
        )[0]
        database.wait_for_rest()
        database.rows("grant select on public.iot_events, public.event_embeddings to tenant")

        assert seen_by(database, tenant) == [theirs]
    assert len(database.embedded()) == 2
    database.assert_invariant()


def test_a_reader_without_a_right_on_events_reads_no_embedding(database: Database) -> None:
    """Vectors give texts away."""
    with serving(database), role(database.conn, "stranger") as stranger:
        database.insert("a")
        database.wait_for_rest()
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match="event_embeddings"):
            seen_by(database, stranger)
        database.rows(f"grant select on public.event_embeddings to {stranger}")
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match="iot_events"):
            seen_by(database, stranger)


def test_the_policy_costs_the_owner_nothing_and_a_reader_no_index(database: Database) -> None:
    """The owner is past it; a reader's search still walks the vector index."""
    database.rows(
        "create index vectors on public.event_embeddings using hnsw (embedding vector_cosine_ops)"
    )
    search = (
        "explain select event_id from public.event_embeddings "
        "order by embedding <=> array_fill(1, array[384])::vector limit 10"
    )
    with role(database.conn, "searcher") as searcher:
        database.rows(f"grant select on public.iot_events, public.event_embeddings to {searcher}")
        plans = {}
        for name in ("postgres", searcher):
            with acting_as(database, name) as conn:
                conn.execute("set enable_seqscan = off")
                plans[name] = str(conn.execute(search.encode()).fetchall())

    assert all("Index Scan using vectors" in plan for plan in plans.values())
    assert "SubPlan" in plans[searcher]
    assert "SubPlan" not in plans["postgres"]


def test_a_reader_has_no_way_into_the_private_schema(database: Database) -> None:
    """Not to its tables, views or functions."""
    with role(database.conn, "curious") as curious, acting_as(database, curious) as conn:
        for statement in ("select from listener.queue", "select listener.coverage('m', 1)"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                conn.execute(statement.encode())


def test_the_operators_policies_and_grants_outlive_an_install(database: Database) -> None:
    """The table is closed once; who may read it afterwards is the operator's choice."""
    with role(database.conn, "analyst") as analyst:
        database.rows("drop policy event_embeddings_as_events on public.event_embeddings")
        database.rows(f"grant select on public.event_embeddings to {analyst}")
        database.rows(f"create policy mine on public.event_embeddings to {analyst} using (true)")
        database.rows("update listener.applied set digest = 'of an earlier version'")

        install_in(database.conn)

        assert seen_by(database, analyst) == []
        policies = database.rows("select polname from pg_policy")
    assert policies == [("mine",)]


def test_the_right_to_watch_outlives_an_install(database: Database) -> None:
    """The rest of the private schema is closed anew."""
    with role(database.conn, "watcher") as watcher:
        database.rows(f"grant usage on schema listener to {watcher}")
        database.rows(f"grant select on listener.status, listener.queue to {watcher}")
        database.rows("update listener.applied set digest = 'of an earlier version'")

        install_in(database.conn)

        may = "select has_table_privilege(%s, %s, 'select')"
        assert database.value(may, watcher, "listener.status")
        assert not database.value(may, watcher, "listener.queue")


@pytest.mark.parametrize(
    "policy",
    ["using (false)", "using (exists (select from public.allowed))", "to listener_owner"],
)
def test_a_policy_of_the_operators_outlives_another_constraint_of_the_key(
    database: Database, policy: str
) -> None:
    """What the foreign key needs is not the policies' business, even under the name of ours."""
    database.rows("create table public.allowed (name text)")
    with role(database.conn, "analyst") as analyst:
        tables = "public.event_embeddings, public.iot_events, public.allowed"
        database.rows(f"grant select on {tables} to {analyst}")
        database.rows(
            f"alter policy event_embeddings_as_events on public.event_embeddings {policy}"
        )
        database.insert("a")
        serve_once(database)
        database.rows(
            "alter table public.event_embeddings drop constraint event_embeddings_event_id_fkey"
        )

        install_in(database.conn)

        assert seen_by(database, analyst) == []


@pytest.mark.parametrize(
    "other", ["as restrictive using (true)", "for delete using (true)", None], ids=str
)
def test_our_policy_comes_back_when_it_went_with_the_table(
    new_database: NewDatabase, other: str | None
) -> None:
    """Whatever policies of the operator's there are that let nobody read."""
    with new_database() as url, with_events(url, "id bigint primary key, message text") as database:
        install_in(database.conn)
        if other:
            database.rows(f"create policy other on public.event_embeddings {other}")
        database.rows("drop table public.iot_events cascade")
        database.rows("create table public.iot_events (id bigint primary key, message text)")

        install_in(database.conn)

        policies = {name for (name,) in database.rows("select polname from pg_policy")}
        assert "event_embeddings_as_events" in policies


def test_an_install_gives_back_the_right_to_a_text_that_was_made_anew(database: Database) -> None:
    """Where nobody may execute a function that nobody was granted."""
    database.rows("alter default privileges revoke execute on functions from public")
    database.rows(
        "drop function listener.embedding_input cascade; "
        "create function listener.embedding_input(event public.iot_events) "
        "returns text language sql stable as $$ select event.message $$"
    )

    install_in(database.conn)

    database.insert("a")
    serve_once(database)
    assert len(database.embedded()) == 1


def test_a_table_that_the_operator_opened_stays_open(database: Database) -> None:
    """To switch row-level security on again would cut readers off."""
    database.rows("alter table public.event_embeddings disable row level security")
    database.rows("grant select on public.event_embeddings to public")
    database.rows("update listener.applied set digest = 'of an earlier version'")

    install_in(database.conn)

    opened = "select relrowsecurity, relacl::text ~ '[{,]=r/' from pg_class where relname = %s"
    assert database.rows(opened, "event_embeddings") == [(False, True)]


@pytest.mark.parametrize("table", ["iot_events", "event_embeddings"])
def test_row_security_that_hides_rows_from_their_owner_is_refused(
    make_server: MakeServer, table: str
) -> None:
    """An event that the service doesn't see would pass for deleted; a vector can't be stored."""
    with plain_owner(make_server()) as (database, _):
        install_in(database.conn)
        database.rows(f"alter table public.{table} enable row level security")
        install.verify(database.conn)
        database.rows(f"alter table public.{table} force row level security")

        with pytest.raises(SchemaError, match=f"public.{table} no force row level security"):
            install.verify(database.conn)
        with pytest.raises(SchemaError, match=f"public.{table} no force row level security"):
            install_in(database.conn)


def test_row_security_that_hides_events_from_a_running_service_ends_it_and_deletes_nothing(
    make_server: MakeServer,
) -> None:
    """What waits is not taken for deleted, nor is what is embedded."""
    with plain_owner(make_server()) as (database, admin):
        install_in(database.conn)
        assert embeds(database, 1)
        admin.execute("create role other")

        def hide(service: RunningService) -> None:
            wait_until(lambda: is_asleep(database))
            admin.execute(
                "alter table public.iot_events owner to other; "
                "alter table public.iot_events enable row level security; "
                "grant select on public.iot_events to plain"
            )
            admin.execute("insert into public.iot_events values (2, 'b')")
            service.thread.join(20)

        with pytest.raises(SchemaError, match="row-level security"), serving(database) as service:
            hide(service)

        with pytest.raises(SchemaError, match="row-level security"):
            delete_orphans(database.conn)
        with pytest.raises(SchemaError, match=r"public\.iot_events may hide rows"):
            install.verify(database.conn)
        assert database.value("select count(*) from listener.waiting") == 1
        assert admin.execute("select count(*) from public.event_embeddings").fetchone() == (1,)


def test_row_security_hides_nothing_from_an_owner_that_is_past_it(
    make_server: MakeServer,
) -> None:
    """Though it is forced."""
    with plain_owner(make_server()) as (database, admin):
        admin.execute("alter role plain bypassrls")
        database.rows(
            "alter table public.iot_events enable row level security, force row level security"
        )
        install_in(database.conn)

        assert embeds(database, 1)


def test_row_security_is_about_who_installed_and_not_about_the_service(database: Database) -> None:
    """Its views read with the rights of a superuser here."""
    for table_name in ("iot_events", "event_embeddings"):
        database.rows(
            f"alter table public.{table_name} enable row level security, force row level security"
        )
    database.insert("a")

    serve_once(database)

    assert len(database.embedded()) == 1


def test_the_service_needs_no_right_on_schema_public(static: Database) -> None:
    """Many close it to everybody but the owner."""
    static.rows("revoke all on schema public from public")
    (event_id,) = static.insert("a")

    listener(static.settings, "run", "--once")

    assert static.embedded().keys() == {event_id}
    # Each would end the test with its exit code.
    listener(static.settings, "check")
    listener(static.settings, "show", str(event_id))


# --- the owner -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "statement",
    [
        "alter table public.iot_events add column extra text",
        "alter table public.iot_events drop column created_at",
        "alter table public.iot_events alter message type varchar(1000)",
        "alter table public.iot_events alter created_at type timestamp",
    ],
)
def test_the_owner_may_alter_the_table_as_before(database: Database, statement: str) -> None:
    """The views depend on the key alone."""
    database.rows(statement)

    database.insert("a")
    with serving(database.with_settings(backfill_last_n=0)):
        wait_until(database.embedded)


def ends_until_installed_again(database: Database, saying: str) -> None:
    """The service ends with that message; after an install it serves."""
    with pytest.raises(SchemaError, match=saying):
        serve_once(database)
    install_in(database.conn)
    serve_once(database)

    database.assert_invariant()


def test_after_created_at_was_dropped_an_install_brings_the_order_of_the_sweep_back(
    database: Database,
) -> None:
    """The service says so and ends; nothing of the text is concerned, and no writer."""
    database.rows("alter table public.iot_events drop column created_at")
    database.insert("a")

    ends_until_installed_again(database, r"created_at does not exist\); run `listener install`")


def test_where_created_at_has_become_null_a_sweep_says_so_instead_of_finding_nothing(
    database: Database,
) -> None:
    """A null comes first in the order by time, and nothing comes after it."""
    database.rows("alter table public.iot_events alter created_at drop not null")
    database.insert("a")
    database.rows("update public.iot_events set created_at = null")

    ends_until_installed_again(database, "ordered by created_at, and it is null in some")


@contextmanager
def plain_owner(server: Server) -> Iterator[tuple[Database, Connection]]:
    """A table whose owner may create no role, on a server without ours; and an administrator."""
    url = server.url()
    with connect(Settings(database_url=url), "admin") as admin:
        admin.execute("create extension vector")
        admin.execute("create role plain login")
        admin.execute("grant create on schema public to plain")
        admin.execute("grant create on database postgres to plain")
        with with_events(
            url.replace("//postgres@", "//plain@"), "id bigint primary key, message text"
        ) as database:
            yield database, admin


def embeds(database: Database, event_id: int) -> bool:
    database.rows("insert into public.iot_events values (%s, 'a')", event_id)
    with serving(database):
        database.wait_for_rest()
    return event_id in database.embedded()


def test_without_any_role_of_ours_the_owner_installs_upgrades_and_serves(
    make_server: MakeServer,
) -> None:
    """Who can't create roles is told, and does without."""
    with plain_owner(make_server()) as (database, _):
        first = install_in(database.conn)
        assert embeds(database, 1)
        make_older(database)

        upgrade = install_in(database.conn)

        assert embeds(database, 2)
        assert install_in(database.conn).steps == ()
        assert database.rows("select rolname from pg_roles where rolname like 'listener%'") == []
    for plan in (first, upgrade):
        assert [note.split("role listener_")[1].split()[0] for note in plan.notes] == [
            "owner",
            "worker:",
        ]


def test_a_worker_role_that_somebody_else_creates_gets_its_rights_by_the_next_install(
    make_server: MakeServer,
) -> None:
    """As the note says."""
    with plain_owner(make_server()) as (database, admin):
        install_in(database.conn)
        admin.execute("create role listener_worker nologin")
        admin.execute("create role helper login in role listener_worker")

        plan = install_in(database.conn)

        assert [step.file for step in plan.steps] == ["009_worker.sql"]
        url = database.settings.database_url.replace("//plain@", "//helper@")
        assert embeds(database.with_settings(database_url=url), 1)


def make_older(database: Database) -> None:
    """As before there were views and row-level security."""
    database.rows("drop view listener.event, listener.embedding")
    database.rows("drop policy event_embeddings_as_events on public.event_embeddings")
    database.rows("alter table public.event_embeddings disable row level security")
    database.rows("grant execute on all functions in schema listener to public")
    database.rows("update listener.applied set digest = 'of an earlier version'")
    database.rows("delete from listener.applied where file like '009%%'")


def test_an_upgrade_closes_what_was_open(database: Database) -> None:
    """Row-level security comes on, and everybody's rights go."""
    make_older(database)
    database.rows("revoke all on all tables in schema listener from listener_worker")
    database.rows("grant all on public.event_embeddings to public")

    install_in(database.conn)

    assert set(database.rows(GRANTS)) == documented()
    assert database.rows("select polname from pg_policy") == [("event_embeddings_as_events",)]
    database.insert("a")
    with serving(database):
        database.wait_for_rest()


def test_a_schema_listener_that_is_closed_to_the_installer_is_named(
    make_server: MakeServer,
) -> None:
    """As one of somebody else normally is; a right on it is not what is missing."""
    with plain_owner(make_server()) as (database, admin):
        admin.execute("create role other; create schema listener authorization other")

        with pytest.raises(SchemaError, match="schema listener belongs to a role"):
            install_in(database.conn)
        with pytest.raises(SchemaError, match="is not this listener's"):
            uninstall_in(database.conn, drop_embeddings=False)


def test_an_install_needs_no_right_to_create_what_is_there(make_server: MakeServer) -> None:
    """Somebody may have taken it back after the first."""
    with plain_owner(make_server()) as (database, admin):
        install_in(database.conn)
        admin.execute("revoke create on database postgres from plain")
        admin.execute("revoke create on schema public from plain")
        database.rows("alter table public.iot_events disable trigger listener_inserted")

        install_in(database.conn)


def test_an_uninstall_takes_roles_and_rights_and_leaves_the_login_role(
    make_server: MakeServer,
) -> None:
    """Unless another database of the server uses them."""
    server = make_server()
    roles = "select rolname from pg_roles where rolname like 'listener%' order by 1"
    settings = Settings(database_url=server.url())
    with connect(settings, "first") as first:
        first.execute("create database other")
        for conn in (first, connect(Settings(database_url=server.url("other")), "second")):
            conn.execute("create table public.iot_events (id bigint primary key, message text)")
            install_in(conn)
            if conn is not first:
                second = conn
        first.execute("create role listener_login login in role listener_worker")

        uninstall_in(first, drop_embeddings=False)
        kept = first.execute(roles).fetchall()
        uninstall_in(second, drop_embeddings=True)
        left = first.execute(roles).fetchall()
        second.close()

    assert kept == [("listener_login",), ("listener_owner",), ("listener_worker",)]
    assert left == [("listener_login",)]


def test_check_as_a_role_without_any_right_names_the_grant(static: Database) -> None:
    """As where the role was made and the second line forgotten."""
    with role(static.conn, "forgotten", "login"):
        url = static.owner.database_url.replace("//postgres@", "//forgotten@")

        finished = listener(replace(static.settings, database_url=url), "check", check=False)

    assert finished.returncode == 3
    assert re.search("^FAIL +schema .*grant listener_worker", finished.stdout, re.MULTILINE)


def test_check_as_the_worker_names_its_role(static: Database) -> None:
    """It passes with no more than the rights of the worker."""
    finished = listener(static.settings, "check")

    assert f"as {SERVICE_ROLE}" in finished.stdout
    assert read_facts(static.conn).worker_role_exists
