-- Takes back what default privileges gave to others when these objects were made. What you grant later
-- stays, unless a later version runs this file again; on listener.status it stays in any case.

do $$
declare
  v_given record;
begin
  for v_given in
    select
      o.kind,
      o.name,
      case when a.grantee = 0 then 'public' else pg_catalog.quote_ident(g.rolname) end as grantee
    from (
      select 'table' as kind, c.oid::regclass::text as name, c.relowner as owner, c.relacl as acl
      from pg_catalog.pg_class c
      where c.relnamespace = 'listener'::regnamespace
        and c.relkind in ('r', 'v')
        and c.relname <> 'status'
      union all
      select 'sequence', c.oid::regclass::text, c.relowner, c.relacl
      from pg_catalog.pg_class c
      where c.relnamespace = 'listener'::regnamespace and c.relkind = 'S'
      union all
      select 'function', p.oid::regprocedure::text, p.proowner, p.proacl
      from pg_catalog.pg_proc p
      where p.pronamespace = 'listener'::regnamespace
    ) o
    cross join lateral pg_catalog.aclexplode(o.acl) a
    left join pg_catalog.pg_roles g on g.oid = a.grantee
    where a.grantee <> o.owner
      and g.rolname is distinct from 'listener_worker'
      and g.rolname is distinct from 'listener_owner'
    group by 1, 2, 3
  loop
    execute pg_catalog.format(
      'revoke all on %s %s from %s', v_given.kind, v_given.name, v_given.grantee
    );
  end loop;
end
$$;
