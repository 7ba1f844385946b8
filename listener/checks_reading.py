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
from listener.status import other_model, read_workers


@dataclass(frozen=True)
class _VectorIndex:
    name: str
    opclass: str
    is_valid: bool
    serves_search: bool


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
    try:
        workers = read_workers(conn)
    except ListenerError as error:
        return Finding("workers", True, f"`listener status` would fail: {error}", warns=True)
    problem = other_model(workers, fingerprint) if fingerprint else None
    return Finding("workers", True, problem or f"{len(workers)} running", warns=problem is not None)
