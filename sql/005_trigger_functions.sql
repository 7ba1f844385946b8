-- What runs inside the writer's transaction. Security definer, so that a writer needs no right
-- here; owned by a role that can't log in; nothing depends on the writer's search path.

-- Insert and update end at the gate: they wake the service only if it sleeps, because a commit
-- that notifies can't share its WAL flush with others. The sleeping worker holds key @gate_key@
-- exclusively; a writer that gets it shared has proof that no worker sleeps, and holds it until its
-- commit is visible, so that no worker can fall asleep before having seen this commit.
--
-- A full NOTIFY queue refuses the commit of whoever notifies. So they are silent from half on, which
-- leaves the rest to others; the service's poll finds the event.

create or replace function listener.queue_inserted()
returns trigger
language plpgsql
security definer
set search_path = ''
as $$
begin
  insert into listener.change (event_id)
  select n.id from new_events n;
  if found and not pg_catalog.pg_try_advisory_xact_lock_shared(@gate_key@) then
    perform pg_catalog.pg_notify('listener', '')
    where pg_catalog.pg_notification_queue_usage() < 0.5;
  end if;
  return null;
end
$$;

-- Records only what now reads differently. If embedding_input fails on a row, or the ids are more than
-- an array holds, the whole statement's rows are recorded: the worker finds the culprit and parks it;
-- the writer is never refused. An array, because an insert within a block that catches errors would
-- cost each update a subtransaction's number.
--
-- An id that only one side has says that ids were changed. A vector goes with its event to the new id,
-- but what waits or is parked under the old one does not: so all are recorded. Old ids too, because
-- after a MERGE that inserted into a partition, Postgres shows that row in the place of the new ones.
--
-- A full join, because the plan is made once a session, for as many rows as its first update has: made
-- for one row, a left join would compare each of a later 10,000 with each. Within a case, so that the
-- planner can't make a left join of it.
create or replace function listener.queue_updated()
returns trigger
language plpgsql
security definer
set search_path = ''
as $$
declare
  v_changed @key_type@[];
begin
  begin
    v_changed := array(
      -- Null where only one side has the id.
      select case when o.id is not null then n.id end
      from new_events n
      full join old_events o on o.id = n.id
      where case
        when n.id is null or o.id is null then true
        else listener.embedding_input(n.*) is distinct from listener.embedding_input(o.*)
      end
    );
  exception when others or assert_failure then
    -- Not '{null}', which under array_nulls = off is a text.
    v_changed := array[null];
  end;
  if pg_catalog.array_position(v_changed, null) is null then
    insert into listener.change (event_id)
    select c.id from unnest(v_changed) as c (id);
  else
    insert into listener.change (event_id)
    select n.id from new_events n
    union
    select o.id from old_events o;
  end if;
  if found and not pg_catalog.pg_try_advisory_xact_lock_shared(@gate_key@) then
    perform pg_catalog.pg_notify('listener', '')
    where pg_catalog.pg_notification_queue_usage() < 0.5;
  end if;
  return null;
end
$$;

revoke all on function listener.queue_inserted() from public;
revoke all on function listener.queue_updated() from public;
