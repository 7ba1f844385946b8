"""Which event is to blame where a statement on many fails, and whether any is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import psycopg
from psycopg import errors
from psycopg.pq import TransactionStatus

from listener import queries
from listener.database import Connection, cause_of, is_of_a_row, translated
from listener.errors import ConnectionLost, SchemaError, StatementTimeout

T = TypeVar("T")

# Classes of a missing object or right, and of the server's own surprise, as a rule no row's fault.
# But an embedding_input that takes what is in a column for a name (a cast to regclass, say) raises
# the former for one event, a damaged row the latter.
_PERHAPS_OF_A_ROW = {"0A", "3F", "42", "XX"}
# Memory that lacks, or a block or file of the server's that can't be read, may be one event's where
# events are read.
_PERHAPS_IF_READ = {"53200", "58030", "58P01"}


def in_parts(
    items: Sequence[T],
    run: Callable[[Sequence[T]], list[Any]],
    fail: Callable[[T, str], None],
    *,
    has_session: bool,
    works_without: Callable[[], bool],
    before_each: Callable[[], None],
    reads_only: bool,
) -> list[Any]:
    """All that `run` returns: for all items, or by halves where it is refused or takes too long.

    An item that is refused alone goes to `fail` with the reason; where the server is slow with
    everything, `fail` takes too long as well, and that raises. Raised at once is:
    - what no single row can cause;
    - a time-out without a session of the service's own, where it may have been a wait for a lock;
    - what may lie in the schema, or if `run` is `reads_only` in the server, unless
      `works_without()` shows that the statement works where it finds no row. To write no row shows
      nothing of the disk.
    `before_each` is called before each try.
    """

    def attempt(some: Sequence[T], is_known_to_work: bool) -> list[Any]:
        before_each()
        try:
            return run(some)
        except StatementTimeout as error:
            if not has_session:
                raise
            reason = str(error)
        except (SchemaError, ConnectionLost, psycopg.Error) as error:
            cause = error if isinstance(error, psycopg.Error) else error.__cause__
            if not isinstance(cause, psycopg.Error) or not _may_be_of_a_row(cause, reads_only):
                raise
            if not is_known_to_work and not is_of_a_row(cause):
                if not works_without():
                    raise
                return attempt(some, True)
            reason = cause_of(cause)
        if len(some) == 1:
            fail(some[0], reason)
            return []
        half = len(some) // 2
        return [*attempt(some[:half], is_known_to_work), *attempt(some[half:], is_known_to_work)]

    return attempt(items, False) if items else []


def _may_be_of_a_row(error: psycopg.Error, reads_only: bool) -> bool:
    state = error.diag.sqlstate or ""
    perhaps = _PERHAPS_OF_A_ROW | (_PERHAPS_IF_READ if reads_only else set())
    return is_of_a_row(error) or bool({state, state[:2]} & perhaps)


def works_without_events(conn: Connection, run: Callable[[], object]) -> bool:
    """Whether `run`, a statement that finds no event, works, and embedding_input on nulls.

    False in a transaction, where after an error nothing more can be tried. Raises SchemaError as
    `require_input` does.
    """
    if conn.info.transaction_status != TransactionStatus.IDLE:
        return False
    require_input(conn)
    run()
    return True


def require_input(conn: Connection) -> None:
    """Raise SchemaError if embedding_input reads a column or calls a function that isn't there.

    Takes a lock on iot_events that waits for DDL only.
    """
    try:
        with translated():
            # A session keeps the plan of a function though a column has another type by now.
            conn.execute(queries.FORGET_PLANS)
            conn.execute(queries.TRY_INPUT)
    except SchemaError as error:
        cause = error.__cause__
        if isinstance(cause, errors.InvalidSchemaName):
            # Schema listener is gone, and the message says that.
            raise
        reason = cause.diag.message_primary if isinstance(cause, psycopg.Error) else error
        raise SchemaError(
            f"listener.embedding_input can't be evaluated ({reason}); if a column is gone, run "
            "`listener install --columns …`; correct it if it is your own"
        ) from error
    except (StatementTimeout, psycopg.DatabaseError):
        # One of the user's own may fail on a row of nulls, which no event is.
        return
