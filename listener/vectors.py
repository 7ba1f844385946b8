"""pgvector's type on a connection, and many vectors as one parameter."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import psycopg
from numpy.typing import NDArray
from pgvector import Vector
from pgvector.psycopg.vector import (
    VectorBinaryDumper,
    VectorBinaryLoader,
    VectorDumper,
    VectorLoader,
)
from psycopg.abc import Buffer
from psycopg.adapt import Dumper
from psycopg.pq import Format
from psycopg.types import TypeInfo

from listener import queries


@dataclass(frozen=True)
class Vectors:
    """Many vectors as one parameter of type vector[]; shape (n, dimension), n at least 1."""

    rows: NDArray[np.float32]


class _VectorsDumper(Dumper):
    # The driver would convert a list of arrays one by one, which takes longer than the cheapest
    # model. The layout is what array_recv and vector_recv of the server read.
    format = Format.BINARY
    element_oid = 0

    def dump(self, obj: Vectors) -> Buffer:
        count, dimension = obj.rows.shape
        layout = np.dtype(
            [
                ("size", ">i4"),
                ("dimension", ">i2"),
                ("unused", ">i2"),
                ("numbers", ">f4", dimension),
            ]
        )
        elements = np.zeros(count, layout)
        elements["size"] = layout.itemsize - 4
        elements["dimension"] = dimension
        elements["numbers"] = obj.rows
        dimensions, has_null, first = 1, 0, 1
        head = struct.pack("!5i", dimensions, has_null, self.element_oid, count, first)
        return head + elements.tobytes()


def register_vector(conn: psycopg.Connection[Any]) -> None:
    """Teach the connection the vector type, in whichever schema pgvector lives."""
    found = conn.execute(queries.VECTOR_TYPE).fetchone()
    if found is None:
        return
    info = TypeInfo(*found)
    info.register(conn)
    of_one, of_many = _dumpers(info.oid, info.array_oid)
    for kind in (Vector, np.ndarray):
        for dumper in of_one:
            conn.adapters.register_dumper(kind, dumper)
    conn.adapters.register_dumper(Vectors, of_many)
    for loader in (VectorLoader, VectorBinaryLoader):
        conn.adapters.register_loader(info.oid, loader)


# The driver keeps every class that it was ever given, and with pgvector's own registration each
# connection, as of each scrape, would bring it new ones.
@cache
def _dumpers(oid: int, array_oid: int) -> tuple[list[type[Dumper]], type[Dumper]]:
    of_one = [type("", (kind,), {"oid": oid}) for kind in (VectorDumper, VectorBinaryDumper)]
    return of_one, type("", (_VectorsDumper,), {"oid": array_oid, "element_oid": oid})
