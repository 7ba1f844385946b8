-- What a superuser makes in an upgrade or a repair belongs to who installed first, as the rest does: it
-- works with that role's rights, calls functions that this role may replace, and is this role's to upgrade.

do $$
declare
  v_first constant name := (
    select pg_catalog.pg_get_userbyid(n.nspowner)
    from pg_catalog.pg_namespace n
    where n.nspname = 'listener'
  );
  v_kind  text;
  v_name  text;
begin
  if v_first = current_user then
    return;
  end if;
  for v_kind, v_name in
    select
      case c.relkind when 'v' then 'view' when 'S' then 'sequence' else 'table' end,
      c.oid::regclass::text
    from pg_catalog.pg_class c
    where c.relkind in ('r', 'v', 'S')
      and (c.relnamespace = 'listener'::regnamespace or c.oid = 'public.event_embeddings'::regclass)
      and c.relowner = current_user::text::regrole
    union all
    select 'function', p.oid::regprocedure::text
    from pg_catalog.pg_proc p
    where p.pronamespace = 'listener'::regnamespace
      -- Those of the triggers are listener_owner's.
      and p.prorettype <> 'pg_catalog.trigger'::regtype
      and p.proowner = current_user::text::regrole
  loop
    execute pg_catalog.format('alter %s %s owner to %I', v_kind, v_name, v_first);
  end loop;
end
$$;
