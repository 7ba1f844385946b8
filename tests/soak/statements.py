"""What the writers execute; `soak.message()` never gives the same text twice."""

from __future__ import annotations

INSERT = b"""
insert into public.iot_events (device_id, event_type, severity, message)
select 'pump-' || n, 'status', 'info', soak.message()
from generate_series(1, %(events)s) n
returning id
"""

MESSAGES = b"select soak.message() from generate_series(1, %(events)s)"
COPY = b"copy public.iot_events (device_id, event_type, severity, message) from stdin"

# Skipping what another writer holds, so that no two writers ever deadlock on their own account.
UPDATE_TEXT = b"""
with picked as materialized (
  select e.id from public.iot_events e
  where e.id >= %(start)s and strpos(e.message, 'poison') = 0
  order by e.id limit %(events)s
  for update skip locked
)
update public.iot_events e set message = soak.message()
from picked p where e.id = p.id
returning e.id
"""

UPDATE_OTHER_COLUMN = b"""
with picked as materialized (
  select e.id from public.iot_events e
  where e.id >= %(start)s
  order by e.id limit %(events)s
  for update skip locked
)
update public.iot_events e set device_id = 'pump-moved'
from picked p where e.id = p.id
returning e.id
"""

DELETE = b"""
with picked as materialized (
  select e.id from public.iot_events e
  where e.id >= %(start)s
  order by e.id limit %(events)s
  for update skip locked
)
delete from public.iot_events e using picked p where e.id = p.id
returning e.id
"""

DELETE_WHOLE = b"""
with picked as materialized (
  select e.id from public.iot_events e
  where e.id >= %(start)s
  order by e.id limit 1
  for update skip locked
)
delete from public.iot_events e using picked p where e.id = p.id
returning e.id, e.message
"""

INSERT_WITH_ID = b"""
insert into public.iot_events (id, device_id, event_type, severity, message)
overriding system value
values (%(id)s, 'pump-again', 'status', 'info', coalesce(%(message)s::text, soak.message()))
returning id
"""

INSERT_POISON = b"""
insert into public.iot_events (device_id, event_type, severity, message)
select 'pump-' || n, 'status', 'warning', 'poison ' || soak.message()
from generate_series(1, %(events)s) n
returning id
"""

POISON_SOME = b"""
with picked as materialized (
  select e.id from public.iot_events e
  where strpos(e.message, 'poison') = 0
  order by e.id desc offset %(skip)s limit 1
  for update skip locked
)
update public.iot_events e set message = 'poison ' || soak.message()
from picked p where e.id = p.id
returning e.id
"""

# Somebody repairs an event: it is no longer parked then.
CURE_ONE = b"""
with picked as materialized (
  select e.id from public.iot_events e
  where strpos(e.message, 'poison') > 0 and e.id >= %(start)s
  order by e.id limit 1
  for update skip locked
)
update public.iot_events e set message = soak.message()
from picked p where e.id = p.id
returning e.id
"""
