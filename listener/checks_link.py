"""What `listener check` looks at on the way to the server, and on the server itself."""

from __future__ import annotations

import ipaddress
import os
import socket
import time

from listener.catalogue import Facts
from listener.config import Settings
from listener.database import Connection, read_clock
from listener.errors import ListenerError
from listener.finding import Finding
from listener.preflight import server_problem
from listener.stop import Stop
from listener.wakeup import Wakeup

# A smaller difference may come from the measurement.
_CLOCKS_APART_SECONDS = 5.0


def no_connection(settings: Settings, error: ListenerError) -> Finding:
    """The failed connection; says so where a host has IPv6 only and there is no way to it."""
    host = str(settings.connection_parameters().get("host") or os.environ.get("PGHOST", ""))
    detail = str(error)
    if _is_beyond_reach(host):
        detail = (
            f"{host} has IPv6 addresses only, and this machine has no route for IPv6; take the "
            "session pooler (port 5432 on Supabase), which has IPv4, or give the machine IPv6"
        )
    return Finding("connection", detail, error.exit_code)


def _is_beyond_reach(host: str) -> bool:
    """Whether all addresses of the host are IPv6 and none has a route from here."""
    if not host or host.startswith(("/", "@")):
        return False
    try:
        found = socket.getaddrinfo(host, 5432, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError):
        return False
    return all(
        family == socket.AF_INET6 and not _has_route(address) for family, *_, address in found
    )


def _has_route(address: tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes]) -> bool:
    # Nothing is sent: connecting a datagram socket only looks for the route.
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(address)
        except OSError:
            return False
    return True


def check_tls(conn: Connection) -> Finding:
    """An unencrypted way over a network works, so it is a warning."""
    mode = _sslmode(conn)
    remedy = "set sslmode=require, or verify-full with sslrootcert, which proves who answers, too"
    if not is_over_a_network(conn.info.hostaddr):
        return Finding("tls", "not needed: the server is on this machine")
    if not conn.pgconn.ssl_in_use:
        who = f"who is on the way to {conn.info.host} can read password and event texts"
        return Finding("tls", f"not encrypted: {who}; {remedy}", warns=True)
    if mode in ("allow", "prefer"):
        return Finding(
            "tls", f"encrypted, but sslmode={mode} would go on without; {remedy}", warns=True
        )
    return Finding("tls", f"encrypted, sslmode={mode}")


def is_over_a_network(address: str) -> bool:
    """Whether the address, as libpq gives it, is another machine's; a Unix socket has none."""
    return bool(address) and not ipaddress.ip_address(address).is_loopback


def _sslmode(conn: Connection) -> str:
    """As it came to be: by DATABASE_URL, PGSSLMODE or libpq's default."""
    found = next(one for one in conn.pgconn.info if one.keyword == b"sslmode")
    return (found.val or b"").decode()


def check_server(facts: Facts) -> Finding:
    """Version, encoding, and that it can be written to."""
    problem = server_problem(facts)
    if problem:
        # 2, because the service waits for a read-only server, which may become writable.
        return Finding("server", problem, 2 if facts.read_only else 3)
    return Finding("server", f"PostgreSQL {facts.server_version // 10000}, a primary")


def check_notify(settings: Settings, wake: Connection, work: Connection) -> Finding:
    """By the NOTIFY that comes back or doesn't; a port or a host name proves nothing."""
    if settings.notify == "never":
        return Finding("notify", f"off by NOTIFY=never; polls every {settings.poll_seconds} s")
    wakeup = Wakeup(wake, Stop(), settings.notify, settings.poll_seconds)
    try:
        if wakeup.listen(work):
            return Finding("notify", "a NOTIFY comes back")
    except ListenerError as error:
        return Finding("notify", str(error), error.exit_code)
    finally:
        wakeup.close()
    return Finding(
        "notify",
        "a NOTIFY doesn't come back: a transaction pooler; connect directly or to a session "
        "pooler (port 5432 on Supabase), or set NOTIFY=never to poll",
        2,
    )


def check_clock(conn: Connection) -> Finding:
    """This machine's clock stamps the logs, the database's everything else."""
    before = time.time()
    database = read_clock(conn)
    after = time.time()
    apart = (before + after) / 2 - database
    if abs(apart) < _CLOCKS_APART_SECONDS + (after - before) / 2:
        return Finding("clock", "as the database's")
    return Finding(
        "clock",
        f"this machine is {abs(apart):.0f} s {'ahead of' if apart > 0 else 'behind'} the "
        "database, so the times in its logs are; have both set by NTP",
        warns=True,
    )
