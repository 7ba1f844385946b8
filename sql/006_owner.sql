-- The owner of the trigger functions: no login, and no right but those the functions use.

do $$
begin
  if not exists (select from pg_catalog.pg_roles where rolname = 'listener_owner') then
    create role listener_owner nologin;
  end if;
  -- Giving a function away takes membership in its new owner, which a superuser doesn't need.
  if not (select rolsuper from pg_catalog.pg_roles where rolname = current_user) then
    grant listener_owner to current_user;
  end if;
exception
  when insufficient_privilege then
    -- Made by somebody else, who made us a member already.
    null;
end
$$;

-- A function's new owner must be able to create in its schema.
grant usage, create on schema listener to listener_owner;
grant insert on listener.change to listener_owner;
grant execute on function listener.embedding_input(public.iot_events) to listener_owner;

alter function listener.queue_inserted() owner to listener_owner;
alter function listener.queue_updated() owner to listener_owner;

revoke create on schema listener from listener_owner;
