-- The demo's own iot_events; on a real database this table is yours.

create table if not exists public.iot_events (
  id          bigint generated always as identity,
  device_id   text not null,
  event_type  text not null,
  severity    text not null,
  message     text,
  created_at  timestamptz not null default now(),
  constraint iot_events_pkey primary key (id)
);

create index if not exists iot_events_created_at_idx on public.iot_events (created_at);
