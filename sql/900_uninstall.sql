-- Leaves iot_events as it was. event_embeddings stays unless it is dropped on purpose.

drop trigger if exists listener_inserted on public.iot_events;
drop trigger if exists listener_updated on public.iot_events;
drop schema if exists listener cascade;

-- The role is shared by the databases of a server; it goes with the last one that uses it.
do $$
begin
  if exists (select from pg_catalog.pg_roles where rolname = 'listener_owner') then
    drop role listener_owner;
  end if;
exception
  when dependent_objects_still_exist or insufficient_privilege then
    raise notice 'role listener_owner stays: another database uses it, or it is not yours';
end
$$;
