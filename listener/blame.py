"""Which event is to blame where a statement on many fails, and whether any is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import psycopg
from psycopg import errors
from psycopg.pq import TransactionStatus

from listener import queries
from listener.database import Connection, describe, is_of_a_row, translated
from listener.errors import SchemaError, StatementTimeout

T = TypeVar("T")

# What the lack of an object or a right gives. An embedding_input gives it for one event, where it
# takes what is in a column for the name of something.
_PERHAPS_OF_A_ROW = {"0A", "3F", "42"}


def in_parts(
    items: Sequence[T],
    run: Callable[[Sequence[T]], list[Any]],
    fail: Callable[[T, str], None],
    has_session: bool,
    works_without: Callable[[], bool] | None,
    before_each: Callable[[], None],
) -> list[Any]:
    """What `run` gives for all, or for halves of what is refused or takes too long.

    An item that is so by itself is failed with the reason. Where the server is slow with all it
    does, that takes too long as well, and raises. Without a session of the service's own, what took
    too long may just have waited for a lock; then it raises at once. What may lie in the schema
    raises, too, unless `works_without` any item; None: that has been seen. `before_each` is
    called before each part is tried.
    """
    if not items:
        return []
    before_each()
    try:
        return run(items)
    except StatementTimeout as error:
        if not has_session:
            raise
        reason = str(error)
    except (SchemaError, psycopg.Error) as error:
        cause = error if isinstance(error, psycopg.Error) else error.__cause__
        assert isinstance(cause, psycopg.Error)  # noqa: S101  only `translated` raises the other
        if not is_of_a_row(cause):
            if (cause.diag.sqlstate or "")[:2] not in _PERHAPS_OF_A_ROW:
                raise
            if works_without is not None:
                if not works_without():
                    raise
                return in_parts(items, run, fail, has_session, None, before_each)
        reason = describe(cause)
    if len(items) == 1:
        fail(items[0], reason)
        return []
    half = len(items) // 2
    return [
        *in_parts(items[:half], run, fail, has_session, works_without, before_each),
        *in_parts(items[half:], run, fail, has_session, works_without, before_each),
    ]


def works_without_events(conn: Connection, run: Callable[[], object]) -> bool:
    """Whether `run`, a statement that finds no event, works, and embedding_input on nothing.

    False in a transaction, in which nothing can be tried any more. Raises SchemaError as
    `require_input` does.
    """
    if conn.info.transaction_status != TransactionStatus.IDLE:
        return False
    with translated():
        # PostgreSQL 18 keeps the plan of an SQL function though a column has another type by now.
        conn.execute(queries.FORGET_PLANS)
    require_input(conn)
    run()
    return True


def require_input(conn: Connection) -> None:
    """Raise SchemaError if embedding_input reads a column or calls a function that isn't there.

    Takes a lock on iot_events that only DDL makes wait.
    """
    try:
        with translated():
            conn.execute(queries.TRY_INPUT)
    except SchemaError as error:
        cause = error.__cause__
        if isinstance(cause, errors.InvalidSchemaName):
            # Ours is gone, and all with it.
            raise
        reason = cause.diag.message_primary if isinstance(cause, psycopg.Error) else error
        raise SchemaError(
            f"listener.embedding_input can't be evaluated ({reason}); if a column is gone, run "
            "`listener install --columns …`; put one of your own right"
        ) from error
    except (StatementTimeout, psycopg.DatabaseError):
        # One of the user's own may fail on a row of nulls, which no event is.
        return
