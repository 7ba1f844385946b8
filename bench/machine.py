"""What the figures were measured on."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from bench.cluster import Cluster

_PEERS = ("procrastinate", "pgqueuer")

_VERSIONS = """
select
  current_setting('server_version'),
  (select v.default_version from pg_catalog.pg_available_extensions v where v.name = 'vector'),
  current_setting('fsync'),
  current_setting('synchronous_commit')
"""


def describe_machine(cluster: Cluster) -> str:
    """A Markdown list: date, processor, and the versions that matter."""
    with cluster.admin() as conn:
        row = conn.execute(_VERSIONS).fetchone()
    assert row is not None
    server, vector, fsync, synchronous = row
    facts = {
        "Date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "CPU": f"{_processor()}, {os.cpu_count()} cores",
        "PostgreSQL": f"{server}, fsync {fsync}, synchronous_commit {synchronous}",
        "pgvector": vector,
        "torch": f"{version('torch')}, sentence-transformers {version('sentence-transformers')}",
        "Peers": ", ".join(f"{name} {version(name)}" for name in _PEERS if find_spec(name))
        or "none",
        "Load average at the start": f"{os.getloadavg()[0]:.2f}",
        "Python": platform.python_version(),
    }
    return "\n".join(f"- {name}: {fact}" for name, fact in facts.items())


def machine_in_a_line(cluster: Cluster) -> str:
    """For the foot of a picture."""
    with cluster.admin() as conn:
        row = conn.execute("select current_setting('server_version')").fetchone()
    assert row is not None
    return f"{_processor()}, {os.cpu_count()} cores; PostgreSQL {row[0]}; torch {version('torch')}"


def _processor() -> str:
    """The kernel's name for it where there is one; Python's own is often empty on Linux."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
