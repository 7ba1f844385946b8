-- What readers use: one unit vector per event, gone with its event.
-- Creating the foreign key locks iot_events against writers until the install commits.

-- Whoever may see an event may see its embedding, if granted select here, and nobody else: the policy
-- asks iot_events with the reader's own rights. Supabase gives its API roles all rights on a new table
-- in public; these are taken back. Both once only, so that your policies and grants stay yours. Whether
-- it was done is not told by row security, which an event trigger may switch on for every new table.
--
-- Key and policy move when another table has taken the name iot_events. The key is not validated: to
-- look at every embedding would keep the writers out meanwhile. `listener backfill --all` deletes those
-- whose event is gone.
do $$
declare
  v_role name;
  v_key name;
  v_must_close boolean := to_regclass('public.event_embeddings') is null;
  v_lacks_key boolean;
begin
  -- "if not exists" would demand the right to create there, although it exists.
  if v_must_close then
    create table public.event_embeddings (
      event_id      @key_type@ not null,
      embedding     @vector@(384) not null,
      model         text not null,
      content_hash  bytea not null,
      embedded_at   timestamptz not null default now(),
      -- Without a name: that of a table which made way for this one may be taken.
      primary key (event_id),
      -- on update cascade: a writer that renumbers an event is not refused because of us.
      constraint event_embeddings_event_id_fkey foreign key (event_id)
        references public.iot_events (id) on update cascade on delete cascade
    );
  end if;
  -- A table that was restored without the policy, too; where it has the policy, it was you who switched
  -- row security off.
  v_must_close := v_must_close or not exists (
    select from pg_catalog.pg_class c
    where c.oid = 'public.event_embeddings'::regclass
      and (c.relrowsecurity or exists (
        select from pg_catalog.pg_policy p
        where p.polrelid = c.oid and p.polname = 'event_embeddings_as_events'
      ))
  );
  v_lacks_key := not exists (
    select from pg_catalog.pg_constraint c
    where c.conrelid = 'public.event_embeddings'::regclass
      and c.contype = 'f'
      and c.confrelid = 'public.iot_events'::regclass
      and c.confdeltype = 'c'
  );
  if v_lacks_key then
    for v_key in
      select c.conname
      from pg_catalog.pg_constraint c
      join pg_catalog.pg_attribute a on a.attrelid = c.conrelid and c.conkey = array[a.attnum]
      where c.conrelid = 'public.event_embeddings'::regclass
        and c.contype = 'f'
        -- The copies for partitions go with their parent's.
        and c.conparentid = 0
        and a.attname = 'event_id'
        and (c.conname = 'event_embeddings_event_id_fkey' or c.confrelid <> 'public.iot_events'::regclass)
    loop
      execute pg_catalog.format('alter table public.event_embeddings drop constraint %I', v_key);
    end loop;
    alter table public.event_embeddings
    add constraint event_embeddings_event_id_fkey foreign key (event_id)
      references public.iot_events (id) on update cascade on delete cascade not valid;
  end if;
  if v_must_close or (
    -- It went with the former table.
    v_lacks_key and not exists (
      select from pg_catalog.pg_policy p
      where p.polrelid = 'public.event_embeddings'::regclass
        and p.polpermissive
        and p.polcmd in ('r', '*')
    )
  ) then
    drop policy if exists event_embeddings_as_events on public.event_embeddings;
    create policy event_embeddings_as_events on public.event_embeddings
    for select
    using (exists (select from public.iot_events e where e.id = event_embeddings.event_id));
  elsif exists (
    -- It is as it was made, and asks the former table.
    select from pg_catalog.pg_policy p
    where p.polrelid = 'public.event_embeddings'::regclass
      and p.polname = 'event_embeddings_as_events'
      and pg_catalog.pg_get_expr(p.polqual, p.polrelid) like
        '(EXISTS ( SELECT%FROM % e%WHERE (e.id = event_embeddings.event_id)))'
      and not exists (
        select from pg_catalog.pg_depend d
        where d.classid = p.tableoid and d.objid = p.oid and d.refobjid = 'public.iot_events'::regclass
      )
  ) then
    alter policy event_embeddings_as_events on public.event_embeddings
    using (exists (select from public.iot_events e where e.id = event_embeddings.event_id));
  end if;
  if not v_must_close then
    return;
  end if;
  alter table public.event_embeddings enable row level security;
  revoke all on public.event_embeddings from public;
  for v_role in
    select r.rolname from pg_catalog.pg_roles r where r.rolname in ('anon', 'authenticated')
  loop
    execute pg_catalog.format('revoke all on public.event_embeddings from %I', v_role);
  end loop;
  -- Default privileges may have given more than to read and write. A trigger there would run with the
  -- rights of the owner, when an event is deleted, or of the service; and no policy stops a truncate.
  for v_role in
    select distinct g.rolname
    from pg_catalog.pg_class c
    cross join lateral pg_catalog.aclexplode(c.relacl) a
    join pg_catalog.pg_roles g on g.oid = a.grantee
    where c.oid = 'public.event_embeddings'::regclass and a.grantee <> c.relowner
  loop
    execute pg_catalog.format(
      'revoke trigger, truncate, references on public.event_embeddings from %I', v_role
    );
  end loop;
end
$$;

comment on table public.event_embeddings is
  'Embedding of each event of iot_events, written by iot-event-listener. Compare vectors of one model only.';
comment on column public.event_embeddings.model is 'name@revision/precision of the model';
comment on column public.event_embeddings.content_hash is 'sha256 of the embedded text, UTF-8';
