"""What makes an install impossible, before anything is done."""

from __future__ import annotations

from listener.catalogue import Facts
from listener.columns import quoted
from listener.config import DIMENSION
from listener.errors import READ_ONLY, SchemaError

_KEY_TYPES = ("bigint", "integer", "uuid", "text")
_OLDEST_SERVER = 150000
_EMBEDDINGS_COLUMNS = ("event_id", "embedding", "model", "content_hash", "embedded_at")


def require_installable(facts: Facts) -> None:
    """Raise SchemaError at the first thing that makes an install impossible."""
    for problem in (server_problem(facts), events_problem(facts), rights_problem(facts)):
        if problem:
            raise SchemaError(problem)


def server_problem(facts: Facts) -> str | None:
    """What makes this server unfit, if anything."""
    if facts.server_version < _OLDEST_SERVER:
        version = facts.server_version // 10000
        return f"the server is PostgreSQL {version}; 15 is the oldest that works"
    if facts.encoding != "UTF8":
        return f"database {facts.database} is encoded in {facts.encoding}; UTF8 is needed"
    if facts.read_only:
        return f"{READ_ONLY} for role or database; connect to the primary, or switch that off"
    if facts.vector_schema is None and not facts.vector_available:
        return "the extension pgvector is not on this server; install its package, then run again"
    return None


def events_problem(facts: Facts) -> str | None:
    """What makes iot_events, or a table of our name, unfit, if anything."""
    if facts.events_kind is None:
        return f"database {facts.database} has no table public.iot_events; create it first"
    if facts.events_kind not in ("r", "p"):
        return "public.iot_events is not a table, and only a table takes the triggers and the key"
    if not facts.events_permanent:
        return (
            "public.iot_events is unlogged, and no foreign key can refer to such a table; "
            "alter table public.iot_events set logged"
        )
    if facts.events_kin:
        return (
            f"public.iot_events is parent, child or partition of table {facts.events_kin}, and "
            "what is written to the one is missed by triggers and foreign key of the other; give "
            "the name to a table that stands alone, or to a partitioned one as a whole"
        )
    if facts.key is None or facts.key.type not in _KEY_TYPES:
        found = "missing" if facts.key is None else facts.key.type
        return f"iot_events.id is {found}; it must be one of {', '.join(_KEY_TYPES)}"
    if not facts.key_is_unique or not facts.key.not_null:
        return (
            "iot_events.id has no primary key or unique constraint of its own, or its collation is "
            "nondeterministic, so that ids which differ are equal; add one, or change the collation"
        )
    if problem := embeddings_problem(facts):
        return problem
    if set(facts.event_id_types) - {facts.key.type}:
        return (
            f"iot_events.id is {facts.key.type}, and event_id in the listener's tables is "
            f"{', '.join(facts.event_id_types)}; run `listener uninstall`, then go on as README "
            "says under 'Altering iot_events'"
        )
    return None


def embeddings_problem(facts: Facts) -> str | None:
    """What makes an event_embeddings that is there unfit, if anything."""
    if not facts.embeddings_columns:
        return None
    if facts.embeddings_type and not facts.embeddings_type.endswith(f"vector({DIMENSION})"):
        return (
            f"public.event_embeddings.embedding is {facts.embeddings_type}, "
            f"not vector({DIMENSION}); rename that table, or drop it with cascade"
        )
    missing = [name for name in _EMBEDDINGS_COLUMNS if name not in facts.embeddings_columns]
    if missing:
        return (
            f"public.event_embeddings has no column {', '.join(missing)}, so it is not the "
            "listener's; rename that table, or drop it with cascade"
        )
    if not facts.embeddings_key_is_unique:
        return (
            "public.event_embeddings.event_id has no primary key of its own; add it, or rename "
            "that table, or drop it with cascade"
        )
    return None


def hidden_problem(facts: Facts) -> str | None:
    """What may hide rows from the listener: an event that is hidden would pass for deleted."""
    if facts.hidden_table is None:
        return None
    return (
        f"row-level security of public.{facts.hidden_table} may hide rows from the listener, which "
        "reads as the owner of view listener.event; let that role have the rights of the table's "
        f"owner, and alter table public.{facts.hidden_table} no force row level security"
    )


def rights_problem(facts: Facts) -> str | None:
    """Which right an install lacks, if any."""
    if not facts.owns_events:
        return f"role {facts.role} doesn't own public.iot_events; install as its owner"
    if problem := hidden_problem(facts):
        return problem
    if not facts.installed and not facts.may_create_schema:
        return (
            f"role {facts.role} may not create a schema; "
            f"grant create on database {quoted(facts.database)} to {quoted(facts.role)}"
        )
    if facts.embeddings_type is None and not facts.may_create_in_public:
        return (
            f"role {facts.role} may not create tables in schema public; "
            f"grant create on schema public to {quoted(facts.role)}"
        )
    return None
