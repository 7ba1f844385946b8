"""The files of `sql/` and what stands for their @placeholders@ in one database."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from psycopg import sql

from listener.catalogue import Facts
from listener.columns import expression, quoted
from listener.wakeup import GATE_KEY
from listener.worker import LOCK_CLASS

_RECORD_APPLIED = """
insert into listener.applied as a (file, digest, columns)
values ({file}, {digest}, {columns})
on conflict (file) do update set
  digest = excluded.digest,
  columns = excluded.columns,
  applied_at = now();
"""


@dataclass(frozen=True)
class Step:
    """One file of `sql/` with its placeholders filled in, or a statement that has none."""

    file: str
    text: str
    columns: tuple[str, ...] | None = None

    @property
    def digest(self) -> str:
        """sha256 of the text, hex."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def reason(self) -> str:
        """The file's opening comment."""
        lines = []
        for line in self.text.splitlines():
            if not line.startswith("--"):
                break
            lines.append(line.removeprefix("--").strip())
        return " ".join(lines)

    @property
    def line(self) -> str:
        """What an operator is told of it."""
        return f"{self.file}: {self.reason or self.text}"

    @property
    def script(self) -> str:
        """The text, and the note in listener.applied that it was run."""
        if not self.file.startswith("0"):
            return self.text
        columns = list(self.columns) if self.columns else None
        values = {"file": self.file, "digest": self.digest, "columns": columns}
        record = sql.SQL(_RECORD_APPLIED).format(**values)
        return self.text.rstrip() + "\n" + record.as_string()


def sql_text(file: str) -> str:
    """A file of `sql/`."""
    return (_folder() / file).read_text("utf-8")


def sql_files() -> list[str]:
    """The numbered files of an install, in order."""
    return sorted(path.name for path in _folder().glob("0*.sql"))


def _folder() -> Path:
    """Inside an installed package, else beside it in a clone."""
    package = Path(__file__).parent
    inside = package / "sql"
    return inside if inside.is_dir() else package.parent / "sql"


def placeholders(facts: Facts, columns: Sequence[str]) -> dict[str, str]:
    """The values of this database; `columns` are what is embedded."""
    assert facts.key is not None  # noqa: S101  require_installable has looked
    key_type = _with_schema(facts.key.type)
    vector_schema = quoted(facts.vector_schema or facts.new_vector_schema)
    text = expression(columns)
    return {
        "key_type": key_type,
        # That of our tables. An id of another one would find no index of theirs.
        "key_collation": 'collate pg_catalog."default"' if facts.key.type == "text" else "",
        "vector_schema": vector_schema,
        "vector": f"{vector_schema}.vector",
        "gate_key": str(GATE_KEY),
        "worker_lock_class": str(LOCK_CLASS),
        "expression": text,
        "quote": _quote(text),
        "has_time": "true" if facts.created_at else "false",
        **_order(facts, key_type),
    }


def _quote(text: str) -> str:
    """A dollar quote that isn't in the text, in which columns' names are."""
    return next(quote for n in count() if (quote := f"${'_' * n}$") not in text)


def _with_schema(key_type: str) -> str:
    """The type with its schema; bigint and integer are keywords that nobody can shadow.

    With an empty search_path pg_temp is searched first, and a type that a caller has made there
    would have its checks run with the function's rights.
    """
    return f"pg_catalog.{key_type}" if key_type in ("uuid", "text") else key_type


def _order(facts: Facts, key_type: str) -> dict[str, str]:
    """How "newest first" is written: by created_at where there is one, else by key.

    A created_at that is nullable or has no index would be read from end to end at each start; an
    integer key is in nearly the same order and has an index, so it is taken instead.
    """
    created = facts.created_at
    time = "e.created_at"
    if not facts.created_at_is_indexed:
        time = f"coalesce({time}, '-infinity')"
    since = f"{time} >= coalesce(p_since, '-infinity')" if created else "true"
    if created is None or facts.newest_by_key:
        return {
            "newest_first": "e.id desc",
            "position": "pg_catalog.jsonb_build_array(e.id)",
            "from_position": f"e.id <= (v_from ->> 0)::{key_type}",
            "in_time": since,
        }
    return {
        "newest_first": f"{time} desc, e.id desc",
        "position": f"pg_catalog.jsonb_build_array({time}, e.id)",
        "from_position": f"({time}, e.id) <= "
        f"((v_from ->> 0)::{created.type}, (v_from ->> 1)::{key_type})",
        "in_time": since,
    }


def fill(text: str, values: dict[str, str]) -> str:
    """Replace every @name@ of the text, but none in what is put there."""
    return re.sub(r"@(\w+)@", lambda found: values[found[1]], text)
