-- The rights of the service: a login role of yours that is a member of listener_worker runs, backfills,
-- retries, checks, searches and shows, and can do nothing else. It has no right on a table in public.

do $$
begin
  if not exists (select from pg_catalog.pg_roles where rolname = 'listener_worker') then
    create role listener_worker nologin;
  end if;
end
$$;

grant usage on schema listener to listener_worker;

-- A row is locked before it is taken, and to lock takes the right to update some column.
grant select, delete, update (changed_at) on listener.change to listener_worker;
grant select, insert, update, delete on listener.queue to listener_worker;
grant select on listener.waiting to listener_worker;
grant select on listener.status, listener.live_worker to listener_worker;
grant usage on sequence listener.lease_token to listener_worker;
grant execute on function listener.compact() to listener_worker;

grant select, insert, delete, update (seen_at) on listener.worker to listener_worker;
grant usage on sequence listener.worker_token to listener_worker;
-- For `listener check`, which compares it with its own files.
grant select on listener.applied to listener_worker;

-- The same for an event, which must not go while its vector is stored. `input` is computed, so it is
-- the one column by which events can be locked, and none changed.
grant select, update (input) on listener.event to listener_worker;
grant select, insert, update, delete on listener.embedding to listener_worker;

grant execute on function listener.embedding_input(public.iot_events) to listener_worker;
grant execute on function listener.input_of(public.iot_events) to listener_worker;
grant execute on function listener.content_hash(public.iot_events) to listener_worker;
grant execute on function listener.page(text, text, integer, timestamptz) to listener_worker;
grant execute on function listener.sweep(text, text, integer, timestamptz) to listener_worker;
grant execute on function listener.coverage(text, integer) to listener_worker;
grant execute on function listener.describe(text) to listener_worker;
grant execute on function listener.latency(integer) to listener_worker;
grant execute on function listener.nearest(@vector@, text, integer) to listener_worker;
