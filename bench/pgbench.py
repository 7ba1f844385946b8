"""Writers: pgbench, prepared single-row inserts of events that differ."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

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


def transactions_per_second(cluster: Cluster, database: str, clients: int, seconds: int) -> float:
    """What pgbench reports, the time to connect left out. Raises BenchError if inserts failed."""
    script = cluster.folder / "insert.sql"
    script.write_text(_SCRIPT)
    finished = subprocess.run(
        _command(cluster, database, script, clients, seconds),
        capture_output=True,
        text=True,
        check=False,
    )
    rate = re.search(r"^tps = ([\d.]+) \(without initial connection time\)", finished.stdout, re.M)
    if finished.returncode != 0 or rate is None:
        raise BenchError(f"pgbench failed:\n{finished.stdout}{finished.stderr}")
    return float(rate[1])


def _command(
    cluster: Cluster, database: str, script: Path, clients: int, seconds: int
) -> list[str]:
    home, port = cluster.server.home, cluster.server.port or 5432
    where = ["-h", str(home), "-p", str(port), "-U", "postgres"]
    load = ["-c", str(clients), "-j", str(min(clients, _THREADS)), "-T", str(seconds)]
    program = str(cluster.server.programs / "pgbench")
    return [program, "-n", "-M", "prepared", "-f", str(script), *load, *where, database]
