"""A database as Supabase gives it: its roles, its default privileges, its schema of extensions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest

from listener import install
from listener.catalogue import read_facts
from listener.config import Settings
from listener.database import Connection, connect
from listener.embedded import Server
from tests.harness import Database, TinyEmbedder, listener, serving
from tests.test_docs import README
from tests.test_install import install_in

# There the role is called postgres; here that is the server's superuser.
PROJECT = "project"

_ROLES = f"""
create role anon nologin noinherit;
create role authenticated nologin noinherit;
create role service_role nologin noinherit bypassrls;
create role {PROJECT} login nosuperuser createdb createrole replication bypassrls;
"""

_DATABASE = f"""
create schema extensions;
grant all on schema extensions to {PROJECT};
grant usage on schema extensions to anon, authenticated, service_role;
create extension vector with schema extensions;
do $$
begin
  execute format('grant all on database %I to {PROJECT}', current_database());
end
$$;
grant create, usage on schema public to {PROJECT};
grant usage on schema public to anon, authenticated, service_role;
alter default privileges for role {PROJECT} in schema public
  grant all on tables to {PROJECT}, anon, authenticated, service_role;
alter default privileges for role {PROJECT} in schema public
  grant all on functions to {PROJECT}, anon, authenticated, service_role;
alter default privileges for role {PROJECT} in schema public
  grant all on sequences to {PROJECT}, anon, authenticated, service_role;
"""

# What a user of the dashboard makes, with the policy that its template offers.
_EVENTS = """
create table public.iot_events (
  id bigint generated always as identity primary key,
  device_id text,
  event_type text,
  severity text,
  message text,
  created_at timestamptz not null default now()
);
create index on public.iot_events (created_at);
alter table public.iot_events enable row level security;
create policy "read own events" on public.iot_events for select to authenticated
using (device_id = (select current_setting('request.device', true)));
"""

NewProject = Callable[[], AbstractContextManager[Database]]


@pytest.fixture(scope="module")
def roles(second_server: Server) -> Server:
    """A server with the roles of Supabase."""
    with psycopg.connect(second_server.url(), autocommit=True) as admin:
        admin.execute(_ROLES.encode())
    return second_server


@pytest.fixture
def new_project(roles: Server, tmp_path: Path) -> NewProject:
    """Make a project with an iot_events, in which the listener is not installed."""
    names = iter(("one", "two"))

    @contextmanager
    def make() -> Iterator[Database]:
        name = next(names)
        with psycopg.connect(roles.url(), autocommit=True) as admin:
            admin.execute(f"create database {name}".encode())
            try:
                with psycopg.connect(roles.url(name), autocommit=True) as inside:
                    inside.execute(_DATABASE.encode())
                url = roles.url(name).replace("//postgres@", f"//{PROJECT}@")
                settings = Settings(database_url=url, poll_seconds=120.0, reports_dir=tmp_path)
                with connect(settings, "listener-test") as conn:
                    conn.execute(_EVENTS.encode())
                    yield Database(settings, conn, settings)
            finally:
                admin.execute(f"drop database {name} with (force)".encode())

    return make


@pytest.fixture
def project(new_project: NewProject) -> Iterator[Database]:
    """A project in which the listener is installed."""
    with new_project() as database:
        install_in(database.conn)
        yield database


@contextmanager
def as_worker(database: Database) -> Iterator[Database]:
    """With the service as the login role that the README has you make."""
    database.rows("create role embedder login password 'long'")
    database.rows("grant listener_worker to embedder")
    try:
        url = database.settings.database_url.replace(f"//{PROJECT}@", "//embedder@")
        yield database.with_settings(database_url=url)
    finally:
        database.rows("drop role embedder")


@contextmanager
def superuser(database: Database) -> Iterator[Connection]:
    """Which the project's own role isn't."""
    url = database.owner.database_url.replace(f"//{PROJECT}@", "//postgres@")
    with connect(Settings(database_url=url), "superuser") as conn:
        yield conn


@contextmanager
def calling(database: Database, role: str, device: str = "pump-1") -> Iterator[Connection]:
    """As its API does, after a request of this role."""
    with superuser(database) as conn:
        conn.execute(f"set role {role}".encode())
        conn.execute("select set_config('request.device', %s, false)", [device])
        yield conn


# --- install and serve ---------------------------------------------------------------------------


def test_the_projects_role_installs_and_a_login_role_of_its_own_serves(
    project: Database, static_model: Path
) -> None:
    """Two lines of SQL make the login role; it needs no right on the schema of pgvector."""
    settings = replace(project.settings, embedding_model=str(static_model))
    with as_worker(project.with_settings(embedding_model=str(static_model))) as database:
        (event_id, *_) = database.insert("pump running hot", "pump running warm", "door open")
        with serving(database):
            database.wait_for_rest()
        database.assert_invariant()

        worker = database.settings
        for command in (
            ["run", "--once"],
            ["check"],
            ["status"],
            ["show", str(event_id)],
            ["search", "pump"],
            ["backfill", "--all", "--work"],
            ["retry", "--all"],
        ):
            listener(worker, *command)
        shown = listener(worker, "show", str(event_id)).stdout
    assert "pump running warm" in shown
    # The role that the project gives will do, too.
    assert "FAIL" not in listener(settings, "check").stdout


def test_the_trigger_functions_belong_to_a_role_that_cannot_log_in(project: Database) -> None:
    """And bypasses nothing."""
    found = project.rows(
        "select distinct r.rolname, r.rolcanlogin, r.rolbypassrls from pg_proc p "
        "join pg_roles r on r.oid = p.proowner "
        "where p.pronamespace = 'listener'::regnamespace and p.prorettype = 'trigger'::regtype"
    )

    assert found == [("listener_owner", False, False)]


def test_an_upgrade_by_a_superuser_gives_no_function_its_rights(project: Database) -> None:
    """They call embedding_input, which the project's role may replace."""
    with superuser(project) as conn:
        for function in (
            "page(text, text, integer, timestamptz)",
            "latency(integer)",
            "nearest(extensions.vector, text, integer)",
            "compact()",
        ):
            conn.execute(f"drop function listener.{function}".encode())

        install_in(conn)

        assert not conn.execute(
            "select p.proname from pg_proc p join pg_roles r on r.oid = p.proowner "
            "where p.pronamespace = 'listener'::regnamespace and p.prosecdef and r.rolsuper"
        ).fetchall()


def test_pgvector_is_created_where_supabase_keeps_extensions(new_project: NewProject) -> None:
    """Never in public. There the role of the project may create it; here only an administrator."""
    with new_project() as database:
        with superuser(database) as admin:
            admin.execute("drop extension vector")

            install_in(admin)

        schema = "select extnamespace::regnamespace::text from pg_extension where extname='vector'"
        assert database.value(schema) == "extensions"


# As Supabase's documentation has it, and many projects.
_CLOSED_AT_BIRTH = """
create function public.rls_auto_enable() returns event_trigger language plpgsql as $$
declare
  made record;
begin
  for made in
    select * from pg_event_trigger_ddl_commands() where command_tag = 'CREATE TABLE'
  loop
    if made.schema_name = 'public' then
      execute format('alter table %s enable row level security', made.object_identity);
    end if;
  end loop;
end
$$;
create event trigger ensure_rls on ddl_command_end when tag in ('CREATE TABLE')
execute function public.rls_auto_enable();
"""


def test_a_table_that_an_event_trigger_closes_at_birth_gets_its_policy_all_the_same(
    new_project: NewProject,
) -> None:
    """And the rights that the API roles have on it by default are taken back."""
    with new_project() as database:
        with superuser(database) as admin:
            admin.execute(_CLOSED_AT_BIRTH.encode())

        install_in(database.conn)

        policies = database.rows(
            "select polname from pg_policy where polrelid = 'public.event_embeddings'::regclass"
        )
        assert policies == [("event_embeddings_as_events",)]
        for api_role in ("anon", "authenticated"):
            may = "select has_table_privilege(%s, 'public.event_embeddings', 'select')"
            assert database.value(may, api_role) is False


def test_an_event_trigger_that_closes_every_table_does_not_close_ours_to_writers(
    new_project: NewProject,
) -> None:
    """Without a policy nobody but the owner could insert into listener.change."""
    with new_project() as database:
        everywhere = _CLOSED_AT_BIRTH.replace("made.schema_name = 'public'", "true")
        assert everywhere != _CLOSED_AT_BIRTH
        with superuser(database) as admin:
            admin.execute(everywhere.encode())

        install_in(database.conn)
        database.insert("a")

        assert len(database.queue()) == 1


# --- the migration -------------------------------------------------------------------------------


def test_the_printed_migration_makes_an_equal_database_complete(
    new_project: NewProject, static_model: Path
) -> None:
    """One file, one transaction; then there is nothing left to install."""
    with new_project() as first, new_project() as second:
        printed = listener(first.settings, "install", "--print", "--columns", "message,severity")
        assert first.value("select to_regnamespace('listener')") is None
        assert "009_worker.sql" in printed.stdout
        assert "role project" not in printed.stderr

        with second.conn.transaction():
            second.conn.execute(printed.stdout.encode())

        install.verify(second.conn)
        again = listener(second.settings, "install")
        assert "nothing to do" in again.stderr
        assert listener(second.settings, "install", "--print").stdout == ""
        settings = replace(second.settings, embedding_model=str(static_model))
        assert "FAIL" not in listener(settings, "check").stdout
        install_in(first.conn, ["message", "severity"])
        assert objects(first.conn) == objects(second.conn)
        second.insert("a")
        with serving(second):
            second.wait_for_rest()
        second.assert_invariant()


def objects(conn: Connection) -> list[object]:
    """Our functions, tables, policies and rights, as the catalogue writes them."""
    statement = """
    select pg_get_functiondef(p.oid), p.proacl::text, p.proowner::regrole::text from pg_proc p
    where p.pronamespace = 'listener'::regnamespace
    union all
    select c.relname, c.relacl::text, concat(c.relkind, c.relrowsecurity, c.reloptions)
    from pg_class c
    where c.relnamespace = 'listener'::regnamespace
      or c.oid in ('public.iot_events'::regclass, 'public.event_embeddings'::regclass)
    union all
    select file, digest, columns::text from listener.applied
    order by 1, 2
    """
    return conn.execute(statement.encode()).fetchall()


def test_a_printed_upgrade_holds_only_what_is_new(project: Database) -> None:
    """A second migration beside the first."""
    project.rows("update listener.applied set digest = 'older' where file = '009_worker.sql'")

    printed = listener(project.settings, "install", "--print").stdout
    with project.conn.transaction():
        project.conn.execute(printed.encode())

    assert printed.count("-- =====") == 1
    assert install.plan_install(project.conn, read_facts(project.conn), None).steps == ()


# --- the API's roles -----------------------------------------------------------------------------


def test_nothing_is_readable_by_the_api_until_it_is_granted(project: Database) -> None:
    """Supabase's default privileges are taken back; one line opens the table to signed-in users."""
    with serving(project):
        project.insert("a")
        project.wait_for_rest()
    statement = "select count(*) from public.event_embeddings"
    for role in ("anon", "authenticated"):
        with (
            calling(project, role) as conn,
            pytest.raises(psycopg.errors.InsufficientPrivilege),
        ):
            conn.execute(statement.encode())

    project.rows("grant select on public.event_embeddings to authenticated")

    with calling(project, "authenticated", "pump-1") as conn:
        assert conn.execute(statement.encode()).fetchone() == (1,)
    with calling(project, "authenticated", "pump-2") as conn:
        assert conn.execute(statement.encode()).fetchone() == (0,)


def test_a_signed_in_user_can_write_no_embedding(project: Database) -> None:
    """Not even with all rights on the table: there is no policy for it."""
    with serving(project):
        project.insert("a")
        project.wait_for_rest()
    project.rows("grant all on public.event_embeddings to authenticated")
    with calling(project, "authenticated") as conn:
        assert conn.execute("update public.event_embeddings set model = 'x'").rowcount == 0
        assert conn.execute("delete from public.event_embeddings").rowcount == 0
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match="row-level security"):
            conn.execute(
                "insert into public.event_embeddings (event_id, embedding, model, content_hash) "
                "select 2, embedding, model, content_hash from public.event_embeddings"
            )


def test_the_readmes_search_finds_a_signed_in_user_his_own_events(project: Database) -> None:
    """Called as its API calls a function, which may not use what is in schema listener."""
    (search,) = re.findall(
        r"^```sql\n(create or replace function public.*?)^```", README, re.M | re.S
    )
    with serving(project):
        first, second = project.insert("pump hot", "door open")
        project.rows("update public.iot_events set device_id = 'pump-2' where id = %s", second)
        project.wait_for_rest()
    project.rows("grant select on public.event_embeddings to authenticated")

    project.rows(search)

    found = "select event_id, similarity from public.match_events(%s::extensions.vector, %s)"
    vector = str(project.embedded()[first].tolist())
    for device, own in (("pump-1", first), ("pump-2", second)):
        with calling(project, "authenticated", device) as conn:
            rows = conn.execute(found.encode(), [vector, TinyEmbedder.fingerprint]).fetchall()
        assert [event_id for event_id, _ in rows] == [own]
        assert (rows[0][1] == pytest.approx(1)) == (own == first)
    with calling(project, "anon") as conn, pytest.raises(psycopg.errors.InsufficientPrivilege):
        conn.execute(found.encode(), [vector, TinyEmbedder.fingerprint])


# --- the linter ----------------------------------------------------------------------------------

_OURS = """
create temporary view ours as
select
  c.*,
  n.nspname,
  has_table_privilege('anon', c.oid, 'select')
    or has_table_privilege('authenticated', c.oid, 'select') as is_read_by_api
from pg_class c
join pg_namespace n on n.oid = c.relnamespace
where n.nspname = 'listener' or c.oid = 'public.event_embeddings'::regclass;

create temporary view functions as
select
  p.*,
  has_function_privilege('anon', p.oid, 'execute')
    or has_function_privilege('authenticated', p.oid, 'execute') as is_called_by_api
from pg_proc p
where p.pronamespace = 'listener'::regnamespace;
"""

# By the names of the linter's findings: what must have no row, and a fault that gives it one.
LINTS = {
    "unindexed_foreign_keys": (
        "select conname from pg_constraint k join ours on ours.oid = conrelid where contype = 'f' "
        "and not exists (select from pg_index where indrelid = conrelid and indisvalid "
        "and string_to_array(indkey::text, ' ')::smallint[] = conkey)",
        "alter table public.event_embeddings drop constraint event_embeddings_pkey",
    ),
    "multiple_permissive_policies": (
        "select polrelid from pg_policy where polpermissive group by polrelid having count(*) > 1",
        "create policy more on public.event_embeddings for select using (true)",
    ),
    "policy_exists_rls_disabled": (
        "select relname from ours join pg_policy p on polrelid = ours.oid where not relrowsecurity",
        "alter table public.event_embeddings disable row level security",
    ),
    "rls_enabled_no_policy": (
        "select relname from ours where relrowsecurity "
        "and not exists (select from pg_policy where polrelid = ours.oid)",
        "drop policy event_embeddings_as_events on public.event_embeddings",
    ),
    "rls_disabled_in_public": (
        "select relname from ours where relkind = 'r' and not relrowsecurity "
        "and (nspname = 'public' or is_read_by_api)",
        "alter table public.event_embeddings disable row level security",
    ),
    "rls_policy_always_true": (
        "select policyname from pg_policies where tablename = 'event_embeddings' "
        "and (qual = 'true' or with_check = 'true')",
        "create policy more on public.event_embeddings for delete using (true)",
    ),
    "duplicate_index": (
        "select relname from ours join pg_indexes on relname = tablename and nspname = schemaname "
        "group by relname, replace(indexdef, indexname, '') having count(*) > 1",
        "create unique index again on public.event_embeddings (event_id)",
    ),
    "security_definer_view": (
        "select relname from ours where relkind = 'v' and is_read_by_api "
        "and not coalesce('security_invoker=true' = any(reloptions), false)",
        "grant select on listener.event to anon",
    ),
    "materialized_view_in_api": (
        "select relname from ours where relkind = 'm' and is_read_by_api",
        "create materialized view listener.m as select 1; grant select on listener.m to anon",
    ),
    "function_search_path_mutable": (
        "select proname from functions "
        "where not coalesce('search_path=\"\"' = any(proconfig), false)",
        "alter function listener.content_hash(public.iot_events) reset search_path",
    ),
    "security_definer_function_executable": (
        "select proname from functions where prosecdef and is_called_by_api",
        "grant execute on function listener.page(text, text, integer, timestamptz) to anon",
    ),
    "pg_graphql_table_exposed": (
        "select relname from ours where is_read_by_api",
        "grant select on public.event_embeddings to authenticated",
    ),
    "extension_in_public": (
        "select extname from pg_extension where extnamespace = 'public'::regnamespace",
        "create extension citext with schema public",
    ),
}


@pytest.mark.parametrize("name", LINTS)
def test_supabases_linter_finds_nothing(project: Database, name: str) -> None:
    """And the question does find the fault, where there is one."""
    statement, fault = LINTS[name]
    if "citext" in fault and not project.rows(
        "select name from pg_available_extensions where name = 'citext'"
    ):
        pytest.skip("this server brings no extension that could be in public")
    project.rows(_OURS)

    assert project.rows(statement) == []

    project.rows(fault)
    assert project.rows(statement) != []


def test_the_one_table_without_a_primary_key_is_so_on_purpose(project: Database) -> None:
    """The linter's remark no_primary_key, INFO: what writers append to has no index."""
    project.rows(_OURS)

    found = project.rows(
        "select relname from ours where relkind = 'r' "
        "and not exists (select from pg_index where indrelid = ours.oid and indisprimary)"
    )

    assert found == [("change",)]


def test_the_view_that_needs_no_other_rights_than_the_callers_has_none(project: Database) -> None:
    """Four read for others what these may not; every other one is security invoker."""
    project.rows(_OURS)

    definers = project.rows(
        "select relname from ours where relkind = 'v' "
        "and not coalesce('security_invoker=true' = any(reloptions), false) order by 1"
    )

    assert definers == [("embedding",), ("event",), ("live_worker",), ("status",)]
