"""Names, functions and triggers that are the user's own, and whatever else is in the way."""

from __future__ import annotations

import pytest

from listener import install
from listener.catalogue import read_facts
from listener.errors import SchemaError
from tests.harness import Database, NewDatabase, TinyEmbedder, listener, serve_once, serving
from tests.test_install import install_in, uninstall_in, with_events

_TEXT = "select listener.embedding_input(t) from public.iot_events t"
_WITH_STANDARD_BODY = """
create or replace function listener.embedding_input(event public.iot_events)
returns text
stable
return event.severity
"""


def test_columns_with_the_names_of_our_aliases_are_columns_like_others(
    new_database: NewDatabase,
) -> None:
    """An update of another column queues nothing, and all are embedded."""
    columns = (
        "id bigint primary key, e text, n text, o text, m text, q text, event text, seen_id int"
    )
    with new_database() as url, with_events(url, columns) as database:
        install_in(database.conn)
        database.rows("insert into public.iot_events values (1, 'e', 'n', 'o', 'm', 'q', 'v', 1)")
        with serving(database):
            database.wait_for_rest()

        database.rows("update public.iot_events set seen_id = 2")
        queued = database.value("select count(*) from listener.change")
        database.rows("update public.iot_events set n = 'other'")

        assert queued == 0
        assert database.value("select count(*) from listener.change") == 1
        assert database.value(_TEXT) == "e: e\nn: other\no: o\nm: m\nq: q\nevent: v"
        database.assert_invariant()


def test_columns_with_names_that_mean_something_to_an_install_are_columns_like_others(
    new_database: NewDatabase,
) -> None:
    """The mark that ends a function's text, and what stands for a value in the files of sql/."""
    columns = 'id bigint primary key, "price $$ end" text, "@newest_first@" text, "@other@" text'
    with new_database() as url, with_events(url, columns) as database:
        install_in(database.conn)
        database.rows("insert into public.iot_events values (1, 'a', 'b', 'c')")

        assert database.value(_TEXT) == "price $$ end: a\n@newest_first@: b\n@other@: c"


def test_columns_with_the_names_of_our_parameters_are_columns_like_others(
    new_database: NewDatabase,
) -> None:
    """Of those of the functions that read iot_events in the order of the newest."""
    names = (
        "v_from, p_model, p_from, p_limit, p_since, p_last, event_id, is_current, place, next_from"
    )
    columns = ", ".join(f"{name.strip()} text" for name in names.split(","))
    columns = f"id bigint primary key, created_at timestamptz default now(), {columns}"
    with new_database() as url, with_events(url, columns) as database:
        install_in(database.conn)
        database.rows("alter table public.iot_events disable trigger listener_inserted")
        database.rows("insert into public.iot_events (id, v_from, place) values (1, 'a', 'b')")
        database.rows("alter table public.iot_events enable always trigger listener_inserted")

        serve_once(database)

        assert set(database.embedded()) == {1}
        assert len(database.rows("select * from listener.latency(10)")) == 1
        assert database.rows("select * from listener.coverage('tests/tiny@1/fp32', 10)") == [(1, 1)]


def test_a_text_reads_the_same_in_every_session(new_database: NewDatabase) -> None:
    """Or a sweep would take what another session wrote for changed, again and again."""
    columns = (
        "id int primary key, w timestamptz, d date, f float8, i interval, r tstzrange, b bytea"
    )
    with new_database() as url, with_events(url, columns) as database:
        install_in(database.conn, ["w", "d", "f", "i", "r", "b"])
        database.rows(
            "insert into public.iot_events values "
            "(1, '2026-01-02 03:04+00', '2026-01-02', 0.1::float8 + 0.2, '2 h', '[2026-1-2,)', 'x')"
        )

        def text(**session: str) -> str:
            for name, value in session.items():
                database.rows("select set_config(%s, %s, false)", name, value)
            return str(database.value(_TEXT))

        expected = text()
        assert expected.startswith(
            "w: 2026-01-02 03:04:00+00\nd: 2026-01-02\nf: 0.30000000000000004\n"
        )
        assert text(timezone="Asia/Tokyo", datestyle="German") == expected
        assert (
            text(intervalstyle="iso_8601", extra_float_digits="0", bytea_output="escape")
            == expected
        )


def test_a_database_that_quotes_all_names_is_like_any_other(new_database: NewDatabase) -> None:
    """There format_type gives "uuid" in quotes."""
    with new_database() as url, with_events(url, "id uuid primary key, message text") as database:
        database.rows("set quote_all_identifiers = on")
        install_in(database.conn)
        install.verify(database.conn)

        assert install_in(database.conn).steps == ()


def test_an_id_of_another_collation_reads_no_embedding_but_its_own(
    new_database: NewDatabase,
) -> None:
    """Each event would else read the whole table of embeddings."""
    columns = 'id text collate "C" primary key, message text'
    with new_database() as url, with_events(url, columns) as database:
        install_in(database.conn)
        database.rows("insert into public.iot_events select n, n from generate_series(1, 9) n")
        serve_once(database)

        database.rows("set enable_seqscan = off")
        scans = (
            "select coalesce(sum(seq_scan), 0) from pg_stat_xact_user_tables "
            "where relname in ('event_embeddings', 'queue')"
        )
        before = database.value(scans)
        seen = database.rows("select * from listener.coverage(%s, 9)", TinyEmbedder.fingerprint)
        database.rows("select * from listener.describe('7')")

        assert seen == [(9, 9)]
        assert database.value(scans) == before


def test_a_table_of_more_columns_than_a_function_takes_arguments_is_embedded(
    new_database: NewDatabase,
) -> None:
    """As a wide table of sensors."""
    names = [f"sensor_{number}" for number in range(120)]
    columns = ", ".join(["id bigint primary key", *(f"{name} text" for name in names)])
    with new_database() as url, with_events(url, columns) as database:
        install_in(database.conn)
        database.rows(
            "insert into public.iot_events (id, sensor_0, sensor_119) values (1, 'a', 'b')"
        )

        assert database.value(_TEXT) == "sensor_0: a\nsensor_119: b"
        assert install_in(database.conn).steps == ()


def test_a_column_that_a_text_of_the_operators_own_does_not_read_may_be_dropped(
    database: Database,
) -> None:
    """What a later install remembers of columns is no matter of that text."""
    database.rows(
        "create or replace function listener.embedding_input(event public.iot_events) "
        "returns text language sql stable as $$ select event.severity $$"
    )
    database.rows("alter table public.iot_events drop column event_type")
    database.rows("drop trigger listener_inserted on public.iot_events")

    install_in(database.conn)

    database.rows(
        "insert into public.iot_events (device_id, severity, message) values ('d', 'info', 'a')"
    )
    assert database.value(_TEXT) == "info"


def test_a_text_of_the_operators_own_is_told_from_ours_in_the_standards_form_too(
    database: Database,
) -> None:
    """Such a function has no source; --columns replaces it, and nothing else does."""
    database.rows(_WITH_STANDARD_BODY)
    database.insert("a")

    kept = install_in(database.conn)
    before = database.value(_TEXT)
    install_in(database.conn, ["message"])

    assert kept.steps == ()
    assert any("replaced by you" in note for note in kept.notes)
    assert before == "info"
    assert database.value(_TEXT) == "a"


def test_another_function_of_the_same_name_is_not_taken_for_the_text(database: Database) -> None:
    """As one with a language."""
    database.rows(
        "create function listener.embedding_input(event public.iot_events, language text) "
        "returns text language sql stable as $$ select event.message $$"
    )

    assert install_in(database.conn).steps == ()


def test_a_trigger_of_the_users_own_is_none_of_ours_whatever_its_name(
    new_database: NewDatabase,
) -> None:
    """It stays, and nothing takes it for one that must go."""
    with new_database() as url, with_events(url, "id bigint primary key, message text") as database:
        database.rows(
            "create function public.audit() returns trigger language plpgsql "
            "as $$ begin return null; end $$"
        )
        database.rows(
            "create trigger listener_deleted after delete on public.iot_events "
            "execute function public.audit()"
        )

        install_in(database.conn)

        assert install_in(database.conn).steps == ()
        uninstall_in(database.conn, drop_embeddings=True)
        assert database.rows("select tgname from pg_trigger where not tgisinternal") == [
            ("listener_deleted",)
        ]


def test_uninstall_leaves_a_table_event_embeddings_of_somebody_else(
    new_database: NewDatabase,
) -> None:
    """What an install refuses to take for its own, an uninstall does not drop."""
    with new_database() as url, with_events(url, "id bigint primary key, message text") as database:
        database.rows("create extension vector")
        database.rows("create table public.event_embeddings (embedding vector(768))")

        with pytest.raises(SchemaError, match=r"vector\(768\)"):
            uninstall_in(database.conn, drop_embeddings=True)

        assert database.value("select to_regclass('public.event_embeddings')") is not None


def test_uninstall_twice_is_once(database: Database) -> None:
    """Nothing of that name is there any more, so nothing is somebody else's."""
    uninstall_in(database.conn, drop_embeddings=True)
    uninstall_in(database.conn, drop_embeddings=True)

    assert read_facts(database.conn).schema_owner is None


def test_a_printed_migration_waits_for_no_lock_for_long_whatever_is_in_it(
    database: Database,
) -> None:
    """Also one that neither makes the table of vectors nor the triggers."""
    database.rows("update listener.applied set digest = 'older' where file = '001_schema.sql'")

    printed = listener(database.owner, "install", "--print").stdout

    assert "001_schema.sql" in printed
    assert "002_event_embeddings.sql" not in printed
    with database.session() as migration, database.session() as writer, writer.transaction():
        writer.execute("lock table listener.change in row exclusive mode")
        migration.execute("set statement_timeout = '10s'")
        with pytest.raises(Exception, match="lock timeout"), migration.transaction():
            migration.execute(printed.encode())
