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
