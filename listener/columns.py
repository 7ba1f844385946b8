"""Which columns of iot_events are embedded, and the SQL that makes their text."""

from __future__ import annotations

from collections.abc import Sequence

from psycopg import sql

from listener.catalogue import Column, Facts
from listener.errors import SchemaError

# Numbers or bytes that say nothing to a model of language.
_UNREADABLE = {"bytea", "tsvector", "vector", "halfvec", "sparsevec", "geometry", "geography"}


def choose_columns(facts: Facts, wanted: Sequence[str] | None) -> tuple[str, ...]:
    """Those wanted, or all that a person would read. Raises SchemaError if there are none such."""
    by_name = {column.name: column for column in facts.columns}
    if wanted:
        unknown = [name for name in wanted if name not in by_name]
        if unknown:
            raise SchemaError(
                f"iot_events has no column {', '.join(unknown)}; it has {', '.join(by_name)}; "
                "name what to embed with --columns"
            )
        return tuple(wanted)
    chosen = tuple(column.name for column in facts.columns if _is_text_like(column))
    if not chosen:
        raise SchemaError(
            "iot_events has only keys, ids and timestamps; name what to embed with --columns"
        )
    return chosen


def _is_text_like(column: Column) -> bool:
    return not (
        column.is_key
        or column.is_foreign_key
        or column.name == "id"
        or column.name.endswith("_id")
        or column.type.startswith("timestamp")
        or column.type.removesuffix("[]").split(".")[-1] in _UNREADABLE
    )


def expression(columns: Sequence[str]) -> str:
    """The bare value of one column; `name: value` lines of several, without the empty ones."""
    parts = {name: f"event.{quoted(name)}::pg_catalog.text" for name in columns}
    if len(parts) == 1:
        return parts[columns[0]]
    lines = [
        f"{sql.Literal(name + ': ').as_string()} || nullif({part}, '')"
        for name, part in parts.items()
    ]
    listed = ",\n    ".join(lines)
    # Not concat_ws: a function takes no more than 100 arguments.
    return f"pg_catalog.array_to_string(array[\n    {listed}\n  ], E'\\n')"


def quoted(name: str) -> str:
    """The name as SQL has it."""
    return sql.Identifier(name).as_string()


def is_replaced(facts: Facts, columns: Sequence[str]) -> bool:
    """Whether embedding_input is another one than an install makes for these columns."""
    # One with a body in the SQL standard's form has an empty source.
    made = f"begin\n  return {expression(columns)};\nend"
    return (facts.input_source or "").strip() != made
