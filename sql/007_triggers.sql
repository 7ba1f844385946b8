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

-- An install from before the table listener.change had two more.
do $$
begin
  if exists (
    select from pg_catalog.pg_trigger g
    where g.tgrelid = 'public.iot_events'::regclass
      and g.tgname in ('listener_deleted', 'listener_truncated')
  ) then
    drop trigger if exists listener_deleted on public.iot_events;
    drop trigger if exists listener_truncated on public.iot_events;
    drop function if exists listener.queue_deleted();
    drop function if exists listener.queue_truncated();
  end if;
end
$$;
