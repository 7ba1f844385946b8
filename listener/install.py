"""Install and uninstall: which steps the database still needs, and all of them or none."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import psycopg

from listener import queries
from listener.catalogue import Facts, read_facts
from listener.columns import choose_columns, is_replaced, quoted
from listener.database import Connection, reading, translated
from listener.errors import SchemaError
from listener.patience import patiently
from listener.preflight import embeddings_problem, hidden_problem
from listener.template import Step, fill, placeholders, sql_files, sql_text
from listener.trust import require_trusted

_EMBEDDINGS_FILE = "002_event_embeddings.sql"
_INPUT_FILE = "003_embedding_input.sql"
_FUNCTIONS_FILE = "005_trigger_functions.sql"
_OWNER_FILE = "006_owner.sql"
_TRIGGERS_FILE = "007_triggers.sql"
_WORKER_FILE = "009_worker.sql"
_OWNERSHIP_FILE = "011_ownership.sql"
# Part of the printed script, too. In a block of plpgsql, so that it also works where a tool for
# migrations opens its transaction by other means than `begin`. The path is for operators: PIN_PATH.
_OPENING = """-- A request for a lock that waits blocks every later one, so give up soon. On all but
-- iot_events sooner than deadlock_timeout (1 s), whose check might end a live worker's statement.
do $$
begin
%s  set local lock_timeout = '0.5s';
  set local search_path = '';
end
$$;
"""
_LOCK_EVENTS = """\
  set local lock_timeout = '2s';
  lock table public.iot_events in share row exclusive mode;
"""
# Writers lock iot_events first and listener.change second; an install in another order would end in
# a deadlock with one that is in between. The file of the text must wait for writers that are under
# way: what they changed was compared as the text was before. That of the triggers never runs alone.
_LOCKING_FILES = {_EMBEDDINGS_FILE, _INPUT_FILE}

_MADE = re.compile(
    r"^ *create (?:or replace )?(?:table|view|sequence|function) (?:if not exists )?([\w.]+)",
    re.MULTILINE,
)
_INDEXED = re.compile(r"^ *create (?:unique )?index if not exists (\w+) on (\w+)\.", re.MULTILINE)
_GONE = """
select n.name
from pg_catalog.unnest(%(names)s::text[]) as n (name)
where to_regclass(n.name) is null
  and not exists (
    select from pg_catalog.pg_proc p
    join pg_catalog.pg_namespace s on s.oid = p.pronamespace
    where s.nspname || '.' || p.proname = n.name
  )
"""


@dataclass(frozen=True)
class Plan:
    """What an install or uninstall would do, in order, and what to tell about it."""

    steps: tuple[Step, ...]
    notes: tuple[str, ...]
    opening: str = ""

    @property
    def script(self) -> str:
        """All that is executed, in one transaction; empty if there is nothing to do."""
        scripts = [f"-- ===== {step.file}\n{step.script}" for step in self.steps]
        return "\n".join([self.opening, *scripts] if scripts else [])


def plan_install(conn: Connection, facts: Facts, columns: Sequence[str] | None) -> Plan:
    """The steps whose file changed since it was applied, or whose result is gone.

    `columns` None keeps the columns of the last install, or takes the default. Raises SchemaError
    where what is there is not to be trusted.
    """
    require_trusted(conn)
    with translated():
        rows = conn.execute(queries.APPLIED).fetchall() if facts.installed else []
    applied = {file: digest for file, digest, _ in rows}
    earlier = next((kept for file, _, kept in rows if file == _INPUT_FILE), None)
    chosen = _choose(facts, columns, earlier)
    values = placeholders(facts, chosen)
    steps = []
    if facts.vector_schema is None:
        schema = quoted(facts.new_vector_schema)
        create = f"create extension if not exists vector with schema {schema};"
        steps.append(Step("create extension", create))
    texts = {file: fill(sql_text(file), values) for file in sql_files()}
    if (
        not _is_whole(facts)
        or _something_is_gone(conn, texts.values())
        or _rights_are_gone(facts, applied)
    ):
        # Every file: more may be altered, and later ones grant rights on what earlier ones make.
        applied = {}
    for file, text in texts.items():
        step = Step(file, text, chosen if file == _INPUT_FILE else None)
        # Whatever another role's install makes is given away.
        is_last = bool(steps) and file == _OWNERSHIP_FILE and facts.schema_owner != facts.role
        if is_last or _is_needed(step, facts, applied, columns is not None):
            steps.append(step)
    if any(step.file == _FUNCTIONS_FILE for step in steps) and not _may_replace(facts):
        raise SchemaError(
            f"the trigger functions belong to listener_owner, and role {facts.role} is no member "
            f"of it; grant listener_owner to {quoted(facts.role)}"
        )
    locks = any(step.file in _LOCKING_FILES for step in steps)
    opening = _OPENING % (_LOCK_EVENTS if locks else "")
    notes = _input_notes(facts, chosen, columns is not None) + _role_notes(facts)
    return Plan(tuple(steps), tuple(notes + _order_notes(facts)), opening)


def _choose(
    facts: Facts, columns: Sequence[str] | None, earlier: Sequence[str] | None
) -> tuple[str, ...]:
    has_input = facts.input_source is not None
    if columns is None and earlier and has_input and is_replaced(facts, earlier):
        # The function was replaced: these are kept for the record, and some may be gone.
        return tuple(earlier)
    return choose_columns(facts, columns or earlier)


def _is_whole(facts: Facts) -> bool:
    """Whether triggers, foreign key, views and function are there, of the tables so named."""
    return (
        facts.triggers_right
        and facts.embeddings_go_with_events
        and facts.views_right
        and facts.input_source is not None
    )


def _something_is_gone(conn: Connection, texts: Iterable[str]) -> bool:
    whole = "\n".join(texts)
    names = _MADE.findall(whole)
    names += [f"{schema}.{index}" for index, schema in _INDEXED.findall(whole)]
    with reading(conn):
        return conn.execute(_GONE, {"names": names}).fetchone() is not None


def _rights_are_gone(facts: Facts, applied: dict[str, str]) -> bool:
    """As after a dump that was restored without owners and privileges, or on another server."""
    owner_is_lost = _OWNER_FILE in applied and not facts.owner_role_owns
    rights_are_lost = _WORKER_FILE in applied and not facts.worker_role_has_rights
    return (owner_is_lost and _may_own(facts)) or (rights_are_lost and _may_grant(facts))


def _may_own(facts: Facts) -> bool:
    may_create = facts.may_create_role and not facts.owner_role_exists
    return may_create or facts.member_of_owner_role


def _may_replace(facts: Facts) -> bool:
    """Whether the trigger functions are this role's to replace."""
    return facts.member_of_owner_role or not facts.owner_role_owns


def _may_grant(facts: Facts) -> bool:
    return facts.worker_role_exists or facts.may_create_role


def _is_needed(step: Step, facts: Facts, applied: dict[str, str], columns_given: bool) -> bool:
    changed = applied.get(step.file) != step.digest
    if step.file == _OWNER_FILE:
        return changed and _may_own(facts)
    if step.file == _WORKER_FILE:
        return changed and _may_grant(facts)
    if step.file == _TRIGGERS_FILE:
        return not facts.triggers_right
    if step.file == _INPUT_FILE and facts.input_source is not None:
        return columns_given if is_replaced(facts, step.columns or ()) else changed
    return changed


def _input_notes(facts: Facts, columns: Sequence[str], columns_given: bool) -> list[str]:
    if facts.input_source is None:
        if not facts.installed:
            return []
        return [
            "listener.embedding_input is made anew, because it was dropped or public.iot_events is "
            "another table than before; one of your own has to be made again; then run "
            "`listener backfill --all`"
        ]
    if is_replaced(facts, columns) and not columns_given:
        return ["listener.embedding_input was replaced by you; it is left as it is"]
    return []


def _role_notes(facts: Facts) -> list[str]:
    notes = []
    if not _may_own(facts) and not facts.owner_role_owns:
        notes.append(
            f"role {facts.role} can't create role listener_owner or is no member of it: the "
            "trigger functions stay its own"
        )
    if not _may_grant(facts):
        notes.append(
            f"role {facts.role} can't create role listener_worker: the service runs as "
            f"{facts.role}, or have that role created and install again"
        )
    return notes


def _order_notes(facts: Facts) -> list[str]:
    if facts.created_at is None or facts.created_at_is_indexed:
        return []
    if facts.newest_by_key:
        return ["iot_events.created_at is nullable or has no plain index; 'the last N' goes by id"]
    return [
        "iot_events.created_at is nullable or has no plain index; a sweep reads the whole table; "
        "make it not null, create index concurrently on public.iot_events (created_at), and run "
        "`listener install` again"
    ]


def apply_plan(conn: Connection, plan: Plan, tell: Callable[[str], None] = lambda _: None) -> None:
    """Run the steps in one transaction, tried again for a minute while somebody holds a lock.

    `tell` gets a line about the holder. Raises SchemaError, with nothing changed, if the lock is
    not to be had, or a step is refused.
    """
    with translated():
        try:
            patiently(conn, lambda: _run(conn, plan), tell)
        except psycopg.OperationalError:
            raise
        except psycopg.DatabaseError as error:
            said = " ".join(filter(None, (error.diag.message_primary, error.diag.message_hint)))
            raise SchemaError(
                f"the database refused it ({said}); nothing was changed; see which object or right "
                "that is, then run it again"
            ) from error


def _run(conn: Connection, plan: Plan) -> None:
    if plan.steps:
        conn.execute(plan.script.encode())


def verify(conn: Connection) -> Facts:
    """Read the catalogue again and raise SchemaError unless everything is in place."""
    facts = read_facts(conn)
    if not (facts.installed and facts.embeddings_type):
        raise SchemaError("the listener is not installed in this database; run `listener install`")
    if not facts.schema_usable:
        raise SchemaError(
            f"role {facts.role} may not use schema listener; grant listener_worker to it, or "
            "connect as the one that installed"
        )
    if problem := embeddings_problem(facts) or hidden_problem(facts):
        raise SchemaError(problem)
    if not facts.triggers_right:
        raise SchemaError(
            "the triggers on iot_events are missing, disabled or altered; run `listener install`"
        )
    if not _is_whole(facts):
        raise SchemaError(
            "listener.embedding_input, a view of schema listener or the foreign key of "
            "event_embeddings is missing, or of another table than public.iot_events and "
            "public.event_embeddings; run `listener install`, then `listener backfill --all`"
        )
    return facts


def is_outdated(conn: Connection, facts: Facts) -> bool:
    """Whether an install would run a file again, because it reads differently now."""
    with reading(conn):
        applied = {file: digest for file, digest, _ in conn.execute(queries.APPLIED)}
    values = placeholders(facts, ())
    return any(
        Step(file, fill(sql_text(file), values)).digest != applied.get(file)
        for file in sql_files()
        # The text may be your own, roles another's to make; `verify` looks at the triggers.
        if file not in (_INPUT_FILE, _OWNER_FILE, _TRIGGERS_FILE, _WORKER_FILE)
    )


def plan_uninstall(facts: Facts, drop_embeddings: bool) -> Plan:
    """The steps that take the listener out; SchemaError if what has our names is another's."""
    if facts.schema_owner and not (facts.installed or facts.triggers):
        raise SchemaError(
            f"schema listener in database {facts.database} is not this listener's: it has no table "
            "applied, and iot_events has none of its triggers; nothing was changed"
        )
    if drop_embeddings and (problem := embeddings_problem(facts)):
        raise SchemaError(problem)
    files = ["900_uninstall.sql"] + (["910_drop_embeddings.sql"] if drop_embeddings else [])
    return Plan(tuple(Step(file, sql_text(file)) for file in files), ())
