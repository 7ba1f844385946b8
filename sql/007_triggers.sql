-- The only thing the listener adds to the user's table. Statement-level: 100,000 rows in one COPY
-- cost one call. "Always": also under session_replication_role = replica. Logical replication itself
-- fires no statement triggers once the first copy is over; the sweep finds its rows.
-- Locks iot_events against writers until the install commits.

create or replace trigger listener_inserted
after insert on public.iot_events
referencing new table as new_events
for each statement execute function listener.queue_inserted();

create or replace trigger listener_updated
after update on public.iot_events
referencing old table as old_events new table as new_events
for each statement execute function listener.queue_updated();

alter table public.iot_events enable always trigger listener_inserted;
alter table public.iot_events enable always trigger listener_updated;

-- A table that had the name before keeps none: they would record its rows as events.
do $$
declare
  v_trigger name;
  v_table regclass;
begin
  for v_trigger, v_table in
    select g.tgname, c.oid
    from pg_catalog.pg_trigger g
    join pg_catalog.pg_class c on c.oid = g.tgrelid
    where g.tgfoid in ('listener.queue_inserted()'::regprocedure, 'listener.queue_updated()'::regprocedure)
      and c.oid <> 'public.iot_events'::regclass
      and not c.relispartition
      and pg_catalog.pg_has_role(c.relowner, 'usage')
  loop
    execute pg_catalog.format('drop trigger %I on %s', v_trigger, v_table);
  end loop;
end
$$;
