"""Writers: pgbench, prepared single-row inserts of events that differ."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from bench.cluster import Cluster
from bench.progress import BenchError

_SCRIPT = """\
\\set device random(1, 200)
\\set reading random(1, 1000000000)
insert into public.iot_events (device_id, event_type, severity, message)
values (
  'pump-' || :device,
  'temperature',
  'warning',
  'bearing temperature above its limit, reading ' || :reading
);
"""
# More would only take the two cores' time from the server.
_THREADS = 2
_STEADY_CLIENTS = 4


def transactions_per_second(cluster: Cluster, database: str, clients: int, seconds: int) -> float:
    """What pgbench reports, the time to connect left out. Raises BenchError if inserts failed."""
    finished = subprocess.run(
        _command(cluster, database, clients, seconds),
        capture_output=True,
        text=True,
        check=False,
    )
    rate = re.search(r"^tps = ([\d.]+) \(without initial connection time\)", finished.stdout, re.M)
    if finished.returncode != 0 or rate is None:
        raise BenchError(f"pgbench failed:\n{finished.stdout}{finished.stderr}")
    return float(rate[1])


@contextmanager
def steady_inserts(cluster: Cluster, database: str, rate: int, seconds: float) -> Iterator[None]:
    """So many inserts a second, of a few clients, while the block runs; `seconds` at most."""
    process = subprocess.Popen(
        _command(cluster, database, _STEADY_CLIENTS, int(seconds) + 1, "-R", str(rate)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield
        if process.poll():
            raise BenchError(f"pgbench ended with {process.returncode}")
    finally:
        process.terminate()
        process.wait()


def _command(cluster: Cluster, database: str, clients: int, seconds: int, *more: str) -> list[str]:
    script = cluster.folder / "insert.sql"
    script.write_text(_SCRIPT)
    home, port = cluster.server.home, cluster.server.port or 5432
    where = ["-h", str(home), "-p", str(port), "-U", "postgres"]
    load = ["-c", str(clients), "-j", str(min(clients, _THREADS)), "-T", str(seconds)]
    program = str(cluster.server.programs / "pgbench")
    return [program, "-n", "-M", "prepared", "-f", str(script), *load, *more, *where, database]
