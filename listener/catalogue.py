"""What the database's catalogue says about the user's table, pgvector, rights and our objects.

Reads catalogue tables only, so that no lock on iot_events is taken or waited for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from uuid import UUID

from psycopg.rows import class_row

from listener.claim import EventId
from listener.database import Connection, reading

_COLUMNS = """
select
  a.attname as name,
  -- Under quote_all_identifiers even the name of a built-in type has quotes.
  replace(pg_catalog.format_type(a.atttypid, null), '"', '') as type,
  exists (
    select from pg_catalog.pg_constraint c
    where c.conrelid = a.attrelid and c.contype = 'p' and a.attnum = any(c.conkey)
  ) as is_key,
  exists (
    select from pg_catalog.pg_constraint c
    where c.conrelid = a.attrelid and c.contype = 'f' and a.attnum = any(c.conkey)
  ) as is_foreign_key,
  a.attnotnull as not_null,
  exists (
    select from pg_catalog.pg_index i
    join pg_catalog.pg_class ic on ic.oid = i.indexrelid
    join pg_catalog.pg_am am on am.oid = ic.relam
    where i.indrelid = a.attrelid
      and i.indkey[0] = a.attnum
      and i.indisvalid
      and i.indpred is null
      and am.amname = 'btree'
      and i.indoption[0] in (0, 3)  -- nulls where `desc` has them, read either way
  ) as leads_an_index
from pg_catalog.pg_attribute a
where a.attrelid = (
    select c.oid
    from pg_catalog.pg_class c
    join pg_catalog.pg_namespace n on n.oid = c.relnamespace
    where n.nspname = 'public' and c.relname = 'iot_events'
  )
  and a.attnum > 0
  and not a.attisdropped
order by a.attnum
"""

# By name: to_regclass fails without usage on the schema. The worker need not have it on public, nor
# anybody on a schema of somebody else that has our name.
_FACTS = """
with in_public as materialized (
  select c.*
  from pg_catalog.pg_class c
  where c.relnamespace = to_regnamespace('public')
    and c.relname in ('iot_events', 'event_embeddings')
), in_listener as materialized (
  select c.* from pg_catalog.pg_class c where c.relnamespace = to_regnamespace('listener')
), unique_alone as (
  select i.indrelid, a.attname
  from pg_catalog.pg_index i
  join pg_catalog.pg_attribute a on a.attrelid = i.indrelid and a.attnum = i.indkey[0]
  left join pg_catalog.pg_collation l on l.oid = i.indcollation[0]
  where i.indrelid in (select c.oid from in_public c)
    and i.indisunique
    and i.indisvalid
    and i.indimmediate
    and i.indnkeyatts = 1
    -- Else ids that are equal may differ.
    and l.collisdeterministic is not false
    and i.indpred is null
)
select
  current_setting('server_version_num')::integer as server_version,
  current_database() as database,
  current_user::text as role,
  (select pg_encoding_to_char(d.encoding) from pg_catalog.pg_database d
   where d.datname = current_database()) as encoding,
  pg_is_in_recovery() or current_setting('transaction_read_only')::boolean as read_only,
  x.nspname as vector_schema,
  x.extversion as vector_version,
  -- Supabase has a schema for them, and its linter wants none in public.
  case when to_regnamespace('extensions') is null then 'public' else 'extensions' end
    as new_vector_schema,
  exists (select from pg_catalog.pg_available_extensions v where v.name = 'vector')
    as vector_available,
  t.relkind::text as events_kind,
  coalesce(t.relpersistence = 'p', false) as events_permanent,
  (
    select k.relname::text
    from pg_catalog.pg_inherits i
    join pg_catalog.pg_class k on k.oid in (i.inhparent, i.inhrelid) and k.oid <> t.oid
    where (i.inhparent = t.oid and t.relkind = 'r') or i.inhrelid = t.oid
    order by k.relname
    limit 1
  ) as events_kin,
  'id' in (select u.attname from unique_alone u where u.indrelid = t.oid) as key_is_unique,
  coalesce(pg_has_role(t.relowner, 'usage'), false) as owns_events,
  (
    -- Hidden from the role that reads for the service: the owner of the views, or who will be.
    select min(f.relname::text)
    from in_public f
    where f.relrowsecurity and (
      select not (v.rolsuper or v.rolbypassrls)
        and (f.relforcerowsecurity or not pg_has_role(v.oid, f.relowner, 'usage'))
      from pg_catalog.pg_roles v
      where v.oid = coalesce(
        (select c.relowner from in_listener c where c.relname = 'event'),
        r.oid
      )
    )
  ) as hidden_table,
  pg_catalog.has_database_privilege(current_database(), 'create') as may_create_schema,
  has_schema_privilege('public', 'create') as may_create_in_public,
  r.rolsuper or r.rolcreaterole as may_create_role,
  o.oid is not null as owner_role_exists,
  coalesce(pg_has_role(o.oid, 'member'), false) as member_of_owner_role,
  exists (select from pg_catalog.pg_roles where rolname = 'listener_worker') as worker_role_exists,
  exists (select from in_listener c where c.relname = 'applied') as installed,
  (select pg_catalog.pg_get_userbyid(n.nspowner) from pg_catalog.pg_namespace n
   where n.nspname = 'listener') as schema_owner,
  coalesce(has_schema_privilege(to_regnamespace('listener')::oid, 'usage'), false) as schema_usable,
  exists (
    select from pg_catalog.pg_proc p
    where p.pronamespace = to_regnamespace('listener') and p.proname = 'queue_inserted'
      and p.proowner = o.oid
  ) as owner_role_owns,
  exists (
    select from pg_catalog.pg_roles w
    join in_listener c on c.relname = 'queue'
    where w.rolname = 'listener_worker'
      and has_table_privilege(w.oid, c.oid, 'insert')
      and has_function_privilege(w.oid, i.oid, 'execute')
  ) as worker_role_has_rights,
  (select replace(format_type(a.atttypid, a.atttypmod), '"', '')
   from pg_catalog.pg_attribute a
   where a.attrelid = m.oid and a.attname = 'embedding'
     and not a.attisdropped) as embeddings_type,
  array(
    select a.attname::text
    from pg_catalog.pg_attribute a
    where a.attrelid = m.oid and a.attnum > 0 and not a.attisdropped
  ) as embeddings_columns,
  exists (
    select from unique_alone u where u.indrelid = m.oid and u.attname = 'event_id'
  ) as embeddings_key_is_unique,
  exists (
    select from pg_catalog.pg_constraint c
    where c.conrelid = m.oid
      and c.contype = 'f'
      and c.confrelid = t.oid
      and c.confdeltype = 'c'
  ) as embeddings_go_with_events,
  array(
    select distinct replace(pg_catalog.format_type(a.atttypid, null), '"', '')
    from pg_catalog.pg_attribute a
    left join in_listener c on c.oid = a.attrelid and c.relname in ('queue', 'change')
    where a.attname = 'event_id' and (c.oid is not null or a.attrelid = m.oid)
  ) as event_id_types,
  coalesce(
    (select pg_catalog.jsonb_object_agg(
       g.tgname, pg_catalog.format('%s %s.%s', g.tgenabled, n.nspname, p.proname)
     )
     from pg_catalog.pg_trigger g
     join pg_catalog.pg_proc p on p.oid = g.tgfoid
     join pg_catalog.pg_namespace n on n.oid = p.pronamespace
     where g.tgrelid = t.oid and g.tgname in ('listener_inserted', 'listener_updated')),
    '{}'
  ) as triggers,
  not exists (
    select from (values ('event', t.oid), ('embedding', m.oid)) as v (name, table_oid)
    where not exists (
      select from in_listener c
      join pg_catalog.pg_rewrite w on w.ev_class = c.oid
      join pg_catalog.pg_depend d on d.classid = w.tableoid and d.objid = w.oid
      where c.relname = v.name and d.refobjid = v.table_oid and d.refobjsubid > 0
    )
  ) as views_right,
  i.prosrc as input_source
from pg_catalog.pg_roles r
left join in_public t on t.relname = 'iot_events'
left join in_public m on m.relname = 'event_embeddings'
left join pg_catalog.pg_roles o on o.rolname = 'listener_owner'
left join pg_catalog.pg_proc i
  on i.pronamespace = to_regnamespace('listener')
  and i.proname = 'embedding_input'
  and i.pronargs = 1
  and i.proargtypes[0] = t.reltype
left join (
  select n.nspname, e.extversion
  from pg_catalog.pg_extension e
  join pg_catalog.pg_namespace n on n.oid = e.extnamespace
  where e.extname = 'vector'
) x on true
where r.rolname = current_user
"""


@dataclass(frozen=True)
class Column:
    """A column of iot_events."""

    name: str
    type: str
    is_key: bool
    is_foreign_key: bool
    not_null: bool
    leads_an_index: bool


@dataclass(frozen=True)
class Facts:
    """One reading of the catalogue; None where the thing doesn't exist."""

    server_version: int
    database: str
    role: str
    encoding: str
    read_only: bool
    vector_schema: str | None
    vector_version: str | None
    new_vector_schema: str
    vector_available: bool
    events_kind: str | None
    events_permanent: bool
    events_kin: str | None
    key_is_unique: bool
    owns_events: bool
    hidden_table: str | None
    may_create_schema: bool
    may_create_in_public: bool
    may_create_role: bool
    owner_role_exists: bool
    member_of_owner_role: bool
    worker_role_exists: bool
    installed: bool
    schema_owner: str | None
    schema_usable: bool
    owner_role_owns: bool
    worker_role_has_rights: bool
    embeddings_type: str | None
    embeddings_columns: list[str]
    embeddings_key_is_unique: bool
    embeddings_go_with_events: bool
    event_id_types: list[str]
    triggers: dict[str, str]
    views_right: bool
    input_source: str | None
    columns: tuple[Column, ...] = ()

    @property
    def key(self) -> Column | None:
        """The column `id` of iot_events."""
        return next((column for column in self.columns if column.name == "id"), None)

    @property
    def created_at(self) -> Column | None:
        """The column `created_at` of iot_events, if it is a point in time."""
        kinds = ("timestamp with time zone", "timestamp without time zone")
        return next((c for c in self.columns if c.name == "created_at" and c.type in kinds), None)

    @property
    def created_at_is_indexed(self) -> bool:
        """Whether created_at is there, never null, and an index begins with it."""
        created = self.created_at
        return created is not None and created.not_null and created.leads_an_index

    @property
    def newest_by_key(self) -> bool:
        """Whether "newest first" goes by id: no created_at, or an integer id alone has an index."""
        is_integer = self.key is not None and self.key.type in ("bigint", "integer")
        return self.created_at is None or (is_integer and not self.created_at_is_indexed)

    def parse_event_id(self, text: str) -> EventId:
        """The id as the key's type. Raises ValueError if it isn't of that type."""
        kinds: dict[str, type[EventId]] = {"bigint": int, "integer": int, "uuid": UUID}
        kind = kinds.get(self.key.type, str) if self.key else str
        return kind(text)

    @property
    def triggers_right(self) -> bool:
        """Whether all triggers are there, enabled always, on the right functions."""
        return self.triggers == {
            f"listener_{verb}": f"A listener.queue_{verb}" for verb in ("inserted", "updated")
        }


def read_facts(conn: Connection) -> Facts:
    """Read all facts. Raises ConnectionLost and SchemaError."""
    with reading(conn):
        with conn.cursor(row_factory=class_row(Column)) as cursor:
            columns = tuple(cursor.execute(_COLUMNS).fetchall())
        with conn.cursor(row_factory=class_row(Facts)) as cursor:
            facts = cursor.execute(_FACTS).fetchone()
    assert facts is not None  # noqa: S101  the statement has exactly one row
    return replace(facts, columns=columns)
