"""What can be made to fail, to take long or to be given up: the text, the sweep, the write."""

from __future__ import annotations

import pytest

from listener import queries
from tests.harness import SERVICE_ROLE, Database

# What the service sees of a backend that ends; unlike a crash, it undoes no commit.
LOSE_CONNECTION = "perform pg_catalog.pg_terminate_backend(pg_catalog.pg_backend_pid())"


def replace_input(database: Database, on_bad: str, volatility: str = "stable") -> None:
    """The text is the message, or what `on_bad` does."""
    _define_input(
        database,
        f"plpgsql {volatility}",
        f"""
        declare
          v_text text;
        begin
          if event.message = 'bad' then
            {on_bad};
          else
            return event.message;
          end if;
        end
        """,
    )


def replace_input_in_sql(database: Database) -> None:
    """The same in a function of SQL, which is a part of each statement; of a bad one a division."""
    _define_input(
        database,
        "sql stable",
        """
        select case
          when event.message = 'bad' then (1 / (length(event.message) - 3))::text
          else event.message
        end
        """,
    )


def _define_input(database: Database, language: str, body: str) -> None:
    database.rows(
        "create or replace function listener.embedding_input(event public.iot_events) "
        f"returns text language {language} set search_path = '' as $${body}$$"
    )


def limit_statements(monkeypatch: pytest.MonkeyPatch, limit: str, instead: str = "8s") -> None:
    """Of the service's sessions from here on; instead of 6s it is their wait for a lock."""
    shorter = queries.SERVICE_SESSION.replace(f"'{instead}'", f"'{limit}'")
    assert shorter != queries.SERVICE_SESSION
    monkeypatch.setattr(queries, "SERVICE_SESSION", shorter)


def refuse_writes(database: Database, condition: str) -> None:
    """As a server that takes no vector, for a condition of plpgsql."""
    _do_before_writes(database, f"raise {condition}")


def slow_down_writes(database: Database, seconds: float) -> None:
    """What each vector then takes, as into a large index on a slow disk."""
    _do_before_writes(database, f"perform pg_sleep({seconds})")


def lose_every_other_write(database: Database) -> None:
    """The connection is lost over the first vector, and each second one from there on."""
    database.rows(
        f"create sequence public.write; grant usage on sequence public.write to {SERVICE_ROLE}"
    )
    _do_before_writes(
        database, f"if nextval('public.write') % 2 = 1 then {LOSE_CONNECTION}; end if"
    )


def _do_before_writes(database: Database, deed: str) -> None:
    database.rows(
        f"""
        create function public.misbehave() returns trigger language plpgsql
        as $$ begin {deed}; return new; end $$
        """
    )
    database.rows(
        "create trigger misbehave before insert on public.event_embeddings "
        "for each row execute function public.misbehave()"
    )


def lose_deadlocks(database: Database) -> None:
    """Let the service find a deadlock first, but not before the other has come to wait as well."""
    database.rows(
        f'alter role {SERVICE_ROLE} in database "{database.conn.info.dbname}" '
        "set deadlock_timeout = '3s'"
    )


_OTHER_SWEEP = """
alter function listener.sweep(text, text, integer, timestamptz) rename to real_sweep;
create function listener.sweep(p_model text, p_from text, p_limit integer, p_since timestamptz)
returns table (scanned bigint, queued bigint, next_from text)
language plpgsql
as $$
begin
  if @condition@ then
    @deed@;
  end if;
  return query select * from listener.real_sweep(p_model, p_from, p_limit, p_since);
end
$$
"""
# As where each page sorts the whole table.
SLOW = "perform pg_sleep(9)"


def change_sweep(database: Database, condition: str, deed: str = SLOW) -> None:
    """What a page comes to where the condition holds."""
    database.rows(_OTHER_SWEEP.replace("@condition@", condition).replace("@deed@", deed))
