"""Who owns the objects that an install finds under its own names."""

from __future__ import annotations

from listener.database import Connection, reading
from listener.errors import SchemaError

# The trigger functions are listener_owner's.
_OTHERS = """
select min(f.name)
from (
  select 'schema listener' as name, s.nspowner as owner
  from pg_catalog.pg_namespace s
  where s.nspname = 'listener'
  union all
  select 'listener.' || c.relname, c.relowner
  from pg_catalog.pg_class c
  where c.relnamespace = to_regnamespace('listener') and c.relkind not in ('i', 'I', 't', 'c')
  union all
  select 'listener.' || p.proname, p.proowner
  from pg_catalog.pg_proc p
  where p.pronamespace = to_regnamespace('listener')
    and p.proowner is distinct from to_regrole('listener_owner')
  union all
  select 'public.event_embeddings', m.relowner
  from pg_catalog.pg_class m
  where m.oid = to_regclass('public.event_embeddings')
) f
join pg_catalog.pg_roles v on v.oid = f.owner
where not (
  v.rolsuper
  or v.rolname = current_user
  or pg_has_role(v.oid, (
    select t.relowner from pg_catalog.pg_class t where t.oid = to_regclass('public.iot_events')
  ), 'usage')
)
"""


def require_trusted(conn: Connection) -> None:
    """Raise SchemaError where there is an object of a role that has no power over iot_events.

    Its owner could have code run with the rights of who installs: by a view in place of a table, a
    trigger, a function. Reads the catalogue only.
    """
    with reading(conn):
        row = conn.execute(_OTHERS).fetchone()
    assert row is not None  # noqa: S101  an aggregate has one row
    if row[0]:
        raise SchemaError(
            f"{row[0]} belongs to a role that is neither superuser, nor yours, nor the owner of "
            "iot_events, and an install would run what is put there; drop it, or alter its owner"
        )
