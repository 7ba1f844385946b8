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
    # Seconds, which a command that only asks for the processor shall not wait for.
    import torch

    with cluster.admin() as conn:
        row = conn.execute(_VERSIONS).fetchone()
    assert row is not None
    server, vector, fsync, synchronous = row
    facts = {
        "Date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "CPU": _processor(),
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
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
    return f"{_processor()}; PostgreSQL {row[0]}; torch {version('torch')}"


def processor_flags() -> set[str]:
    """What the processor can do, as Linux names it; empty elsewhere."""
    return set(_of_processor("flags").split())


def _processor() -> str:
    """The kernel's name for it where there is one; Python's own is often empty on Linux."""
    name = _of_processor("model name") or platform.processor() or platform.machine()
    cores = os.cpu_count()
    # Linux alone tells to how many of them this process was bound.
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    return f"{name}, {cores} cores" if bound == cores else f"{name}, {bound} of {cores} cores"


def _of_processor(fact: str) -> str:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith(fact))
    return next(named, "")
