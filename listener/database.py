"""Connections: open, keep alive, retry, and translate the driver's errors into ours."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import psycopg
from psycopg import IsolationLevel, errors
from psycopg.abc import RV, PQGen
from psycopg.types.string import StrDumper
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    wait_random_exponential,
)

from listener import queries
from listener.config import Settings
from listener.errors import (
    READ_ONLY,
    ConfigError,
    ConnectionLost,
    ListenerError,
    SchemaError,
    StatementTimeout,
)
from listener.logs import log, redact
from listener.stop import Stop
from listener.vectors import register_vector

# The server gives a statement of the service up after 8 s and says so; silence for longer is a
# dead link, which keepalives alone don't find where a proxy or a stopped server answers them.
_ANSWER_SECONDS = 10.0

# SQLSTATEs, or classes of them, of which no single row is the cause: the connection, the
# transaction, the statement itself, the server's state and resources, other servers. All the rest
# one row can bring about, by what is in it or by an embedding_input of the operator's own, whose
# codes are free. Of some, `blame` finds out whether it was one.
_NOT_OF_A_ROW = {
    *("08", "0A", "25", "26", "28", "34", "3D", "3F", "40", "42"),
    *("53", "55006", "55P02", "55P03", "55P04", "57", "58", "72", "F0", "HV", "XX"),
}

# A dead peer is noticed after idle + interval * count = 19 s; with data on the way, after 10.
_LIVELINESS = {
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 3,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
}


class Connection(psycopg.Connection[Any]):
    """A connection that need not wait for an answer for ever."""

    answer_seconds: float | None = None

    def wait(self, gen: PQGen[RV], *args: Any, **kwargs: Any) -> RV:
        """Raises OperationalError, the connection closed, after `answer_seconds` of silence."""
        if self.answer_seconds is not None:
            gen = self._within(gen, self.answer_seconds)
        return super().wait(gen, *args, **kwargs)

    def _within(self, gen: PQGen[RV], seconds: float) -> PQGen[RV]:
        deadline = time.monotonic() + seconds
        try:
            wanted = next(gen)
            while True:
                ready = yield wanted
                if ready:
                    deadline = time.monotonic() + seconds
                elif time.monotonic() > deadline:
                    self.pgconn.finish()
                    raise psycopg.OperationalError(f"the server was silent for {seconds:.0f} s")
                wanted = gen.send(ready)
        except StopIteration as end:
            result: RV = end.value
            return result


def connect(
    settings: Settings, name: str, *, as_service: bool = False, answer_seconds: float | None = None
) -> Connection:
    """Open an autocommit connection with this application_name and the pgvector types known.

    As the service's, or with `answer_seconds`, it answers within so many seconds or is lost. Raises
    ConnectionLost if no connection comes about, ConfigError if none ever can.
    """
    parameters = {
        **_LIVELINESS,
        **settings.connection_parameters(),
        "application_name": name,
        # In another, such as one of a connection string, a text is an error or another text.
        "client_encoding": "UTF8",
    }
    try:
        conn = Connection.connect(**parameters, autocommit=True)
    except psycopg.OperationalError as error:
        reason = redact(" ".join(str(error).split()), settings.secrets())
        # The driver's own traceback would carry the password among its arguments.
        raise ConnectionLost(f"no connection to Postgres: {reason}") from None
    except (psycopg.ProgrammingError, UnicodeError) as error:
        # The driver reads these itself: a number with a unit, a name that can't be a host's.
        raise ConfigError(
            "a part of DATABASE_URL, or of libpq's own variables, can't be used "
            f"({redact(str(error), settings.secrets())}); put it right"
        ) from None
    # Strings as text, not as unknown, so that a list of text keys is an array to unnest.
    conn.adapters.register_dumper(str, StrDumper)
    conn.answer_seconds = _ANSWER_SECONDS if as_service else answer_seconds
    # Of transactions; a command has the database's default otherwise.
    conn.isolation_level = IsolationLevel.READ_COMMITTED
    if not as_service:
        # It may be a transaction pooler's, where the next server doesn't know what was prepared.
        conn.prepare_threshold = None
    try:
        with translated():
            register_vector(conn)
    except (ListenerError, psycopg.Error):
        conn.close()
        raise
    return conn


def notice_loss(conn: Connection) -> None:
    """Raise ConnectionLost if it was lost while nothing was asked of it, as while the model ran.

    The next statement, which would find that out as well, would be blamed for it.
    """
    with translated():
        # The first may find no more than the server's last words.
        conn.pgconn.consume_input()
        conn.pgconn.consume_input()


def with_all_events(
    conn: Connection, statement: str, parameters: Mapping[str, object] | None = None
) -> psycopg.Cursor[Any]:
    """Run a statement that would take an event it can't see for deleted, or its page for the last.

    Raises SchemaError where row-level security would hide some. In one message, and so in one
    transaction that the server ends, even where this side has stopped.
    """
    with translated():
        cursor = psycopg.ClientCursor(conn)
        cursor.execute(queries.WITH_ALL_EVENTS + statement, parameters)
        while cursor.nextset():
            pass
        return cursor


@contextmanager
def reading(conn: Connection) -> Iterator[None]:
    """Read in a transaction with operators of Postgres' own, at read committed.

    At a stricter default of the database a command's read could make a writer's transaction fail.
    Raises what `translated` does.
    """
    with translated(), conn.transaction():
        conn.execute(queries.PIN_PATH)
        yield


def read_clock(conn: Connection) -> float:
    """The database's time, in seconds of the epoch."""
    with translated():
        row = conn.execute(queries.CLOCK).fetchone()
    assert row is not None  # noqa: S101  the statement has one row
    return float(row[0])


@contextmanager
def translated() -> Iterator[None]:
    """Turn the driver's errors into the class that says what happens next.

    Those that a single row can cause pass through, for `blame.in_parts`.
    """
    try:
        yield
    except (
        errors.UndefinedObject,
        errors.UndefinedTable,
        errors.UndefinedFunction,
        errors.UndefinedColumn,
        errors.InvalidSchemaName,
        # A unique index that is gone; an object of another kind.
        errors.InvalidColumnReference,
        errors.WrongObjectType,
    ) as error:
        raise SchemaError(
            f"the database lacks what the listener needs ({error.diag.message_primary}); "
            "run `listener install`"
        ) from error
    except errors.InsufficientPrivilege as error:
        raise SchemaError(
            f"a right is missing ({error.diag.message_primary}); grant listener_worker to the "
            "role, or connect as the one that installed"
        ) from error
    except errors.ReadOnlySqlTransaction as error:
        raise ConnectionLost(READ_ONLY) from error
    except (errors.TransactionTimeout, errors.IdleInTransactionSessionTimeout) as error:
        raise ConnectionLost(cause_of(error)) from error
    except errors.QueryCanceled as error:
        raise StatementTimeout(cause_of(error)) from error
    except (psycopg.OperationalError, psycopg.InterfaceError) as error:
        if is_of_a_row(error):
            raise
        raise ConnectionLost(cause_of(error)) from error


def is_of_a_row(error: psycopg.Error) -> bool:
    """Whether a single row can be the cause, by the SQLSTATE."""
    state = error.diag.sqlstate
    return state is not None and not {state, state[:2]} & _NOT_OF_A_ROW


def cause_of(error: Exception) -> str:
    """The name and message of an error of the driver, in one line; of one of ours, what it says."""
    if not isinstance(error, psycopg.Error):
        return str(error)
    message = error.diag.message_primary or " ".join(str(error).split())
    return f"{type(error).__name__}: {message}"


def reconnecting(stop: Stop) -> Retrying:
    """Retry for connection-class errors only, with random exponential waits of at most 10 s.

    A fresh one for each outage, so that the waits start small again after a healthy spell.
    """
    return Retrying(
        retry=retry_if_exception_type(ConnectionLost),
        wait=wait_random_exponential(multiplier=0.2, max=10),
        stop=lambda _: stop.is_set(),
        sleep=stop.wait,
        before_sleep=_announce,
        reraise=True,
    )


def _announce(state: RetryCallState) -> None:
    assert state.outcome is not None  # noqa: S101  tenacity calls this after an outcome only
    assert state.next_action is not None  # noqa: S101  and before a sleep only
    log(
        logging.WARNING,
        "connection_lost",
        attempt=state.attempt_number,
        retry_in_seconds=state.next_action.sleep,
        cause=state.outcome.exception(),
    )
