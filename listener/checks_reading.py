"""What `listener check` looks at in an installed database besides the schema and the rights."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from psycopg.rows import class_row

from listener import queries
from listener.config import DIMENSION
from listener.database import Connection, translated
from listener.errors import ListenerError
from listener.finding import Finding
from listener.search import nearest
from listener.status import read_workers


@dataclass(frozen=True)
class _VectorIndex:
    name: str
    opclass: str
    is_valid: bool
    serves_search: bool


def check_visible(conn: Connection) -> Finding:
    """Row-level security of iot_events: an event that can't be seen would pass for deleted."""
    with translated():
        hidden = conn.execute(queries.HIDDEN_EVENTS).fetchall()
    if not hidden:
        return Finding("visible", True, "row-level security hides no event from this role")
    role = conn.info.user
    without = [command for command, policies in hidden if not policies]
    if without:
        return Finding(
            "visible",
            False,
            f"row-level security hides iot_events from role {role}, which would take the events "
            f"for deleted; create policy listener on public.iot_events for all to {role} "
            f"using (true)   (missing for {' and '.join(without)})",
            3,
        )
    names = sorted({name for _, policies in hidden for name in policies})
    return Finding(
        "visible",
        True,
        f"row-level security of iot_events lets role {role} see what {', '.join(names)} allow; "
        "an event that it can't see passes for deleted",
        warns=True,
    )


def check_search(conn: Connection) -> Finding:
    """The operator of `search`, and whether an index serves it. The service needs neither."""
    try:
        # No rows are asked for, so none are read; but the operator is looked up.
        nearest(conn, np.zeros(DIMENSION, np.float32), "", 0)
    except ListenerError as error:
        return Finding("search", True, f"`listener search` would fail: {error}", warns=True)
    with translated(), conn.cursor(row_factory=class_row(_VectorIndex)) as cursor:
        indexes = cursor.execute(queries.VECTOR_INDEXES).fetchall()
    for index in indexes:
        if not index.is_valid:
            problem = f"index {index.name} is invalid: its build failed"
        elif not index.serves_search:
            problem = f"index {index.name} ({index.opclass}) serves no search by cosine"
        else:
            continue
        remedy = "drop it and make the one in README, 'Reading the vectors'"
        return Finding("search", True, f"{problem}; {remedy}", warns=True)
    served = ", ".join(f"by index {index.name}" for index in indexes)
    return Finding("search", True, served or "exact: there is no vector index")


def check_workers(conn: Connection, fingerprint: str | None) -> Finding:
    """Two workers with two models undo each other's work. `fingerprint` None: ours is unknown."""
    workers = read_workers(conn)
    others = [worker for worker in workers if fingerprint not in (None, worker["model"])]
    if not others:
        return Finding("workers", True, f"{len(workers)} running")
    first = others[0]
    return Finding(
        "workers",
        True,
        f"worker {first['worker']} on {first['host']} embeds with {first['model']}; set the same "
        "EMBEDDING_MODEL, EMBEDDING_REVISION and PRECISION for all, or they undo each other's work",
        warns=True,
    )
