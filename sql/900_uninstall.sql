-- Leaves iot_events as it was. event_embeddings stays unless it is dropped on purpose.

drop trigger if exists listener_inserted on public.iot_events;
drop trigger if exists listener_updated on public.iot_events;
-- Until the end writers wait behind this, so the other locks, which a reader may hold, are waited for
-- less long; and sooner than deadlock_timeout (1 s), as an install does.
set local lock_timeout = '0.5s';
drop schema if exists listener cascade;

-- The roles are shared by the databases of a server; they go with the last one that uses them. A login
-- role that was a member stays.
do $$
declare
  v_role name;
begin
  for v_role in
    select r.rolname from pg_catalog.pg_roles r
    where r.rolname in ('listener_owner', 'listener_worker')
  loop
    begin
      execute pg_catalog.format('drop role %I', v_role);
    exception
      when dependent_objects_still_exist or insufficient_privilege then
        null;
    end;
  end loop;
end
$$;
