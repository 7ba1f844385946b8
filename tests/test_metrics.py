"""What an operator's monitoring sees of a running service, and what it costs."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from wsgiref.simple_server import demo_app

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from listener import queries
from listener.config import Settings
from listener.counters import Histogram
from listener.database import connect
from listener.embedded import Server
from listener.endpoint import _MOST_THREADS, _Handler, _listen, start_endpoint
from listener.errors import ConfigError, ListenerError
from listener.health import Health, health
from listener.metrics import make_registry
from tests.harness import (
    DEADLINE_SECONDS,
    Command,
    Database,
    Spawn,
    free_port,
    listener,
    wait_until,
)
from tests.proxy import Proxy, proxied
from tests.test_docs import README, ROOT, table

MONITORING = ROOT / "systemd" / "monitoring"
PASSWORD = "hunter2-s3cret"  # noqa: S105  a password to look for


@dataclass
class Endpoint:
    """The HTTP side of one worker."""

    worker: Command
    port: int = field(default_factory=free_port)

    def get(self, path: str) -> tuple[int, str]:
        """Status and body; status 0 while nobody answers."""
        # Prometheus gives up after 10 s.
        client = http.client.HTTPConnection("127.0.0.1", self.port, timeout=8)
        try:
            client.request("GET", path)
            response = client.getresponse()
            return response.status, response.read().decode()
        except (ConnectionError, TimeoutError):
            return 0, ""
        finally:
            client.close()

    def status(self, path: str) -> int:
        return self.get(path)[0]

    def values(self) -> dict[str, float]:
        """Every sample by name, with its lane in brackets where it has one."""
        found = {}
        for family in text_string_to_metric_families(self.get("/metrics")[1]):
            for sample in family.samples:
                lane = sample.labels.get("lane")
                found[f"{sample.name}[{lane}]" if lane else sample.name] = sample.value
        return found

    def value(self, name: str) -> float:
        return self.values().get(name, float("nan"))


@pytest.fixture
def watch(spawn: Spawn) -> Callable[..., Endpoint]:
    """Start a worker with the tiny model and an endpoint."""

    def start(database: Database, **variables: str) -> Endpoint:
        port = free_port()
        settings = replace(database.settings, metrics_port=port)
        endpoint = Endpoint(spawn(settings, "run", module="tests.tiny_worker", **variables), port)
        endpoint.worker.wait_for("event=metrics_served")
        return endpoint

    return start


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    """A network between worker and server that can fail."""
    assert server.port is not None
    with proxied(server.port) as made:
        yield made


def test_counters_move_with_what_happens(
    database: Database, watch: Callable[..., Endpoint]
) -> None:
    """Inserted, repeated, too long, refused: each shows in its own number."""
    endpoint = watch(database, MAX_ATTEMPTS="1")

    database.insert("twice", "twice", "word " * 600, "raise")
    database.wait_for_rest()

    values = wait_until(
        # Counted last: the answer to the failure may come after a scrape that shows it parked.
        lambda: (
            (v := endpoint.values()).get("listener_parked_events") == 1
            and v["listener_batch_events_sum"] == 4
            and v
        ),
    )
    assert values["listener_events_stored_total"] == 3
    assert values["listener_commit_to_vector_seconds_count"] == 3
    assert values["listener_texts_encoded_total"] == 3
    assert values["listener_texts_reused_total"] == 1
    assert values["listener_texts_truncated_total"] == 1
    assert values["listener_failed_attempts_total"] == 1
    assert values["listener_workers"] == 1


def test_a_backfill_is_counted_but_has_no_latency(
    database: Database, watch: Callable[..., Endpoint]
) -> None:
    """Nobody waited for its commit."""
    database.insert("old", "older")
    database.forget_queue()
    endpoint = watch(database)

    wait_until(lambda: len(database.embedded()) == 2)

    wait_until(lambda: endpoint.value("listener_events_stored_total") == 2)
    assert endpoint.value("listener_commit_to_vector_seconds_count") == 0
    wait_until(lambda: endpoint.value("listener_coverage_ratio") == 1)


def test_a_value_is_counted_at_the_first_bound_that_holds_it() -> None:
    """And one that is beyond them all at none, so that a lag of days is not shown as an hour."""
    histogram = Histogram((1.0, 2.0))

    for value in (0.5, 1.0, 1.5, 2.0, 3.0):
        histogram.observe(value)

    assert (histogram.counts, histogram.total) == ([2, 2, 1], 8.0)


def test_a_scrape_is_answered_while_the_model_runs(
    database: Database, watch: Callable[..., Endpoint]
) -> None:
    """The backlog shows by lane, the worker is ready, and its loop makes progress."""
    database.park(*database.insert("parked"))
    endpoint = watch(database, BACKFILL_LAST_N="0")
    database.insert("hang", "waits")
    wait_until(lambda: database.leased() == 2)
    database.rows(
        "insert into listener.queue (event_id, lane, due_at) values (99, 1, now() + '1h')"
    )

    values = wait_until(
        lambda: (v := endpoint.values()).get("listener_pending_events[live]") == 2 and v
    )

    assert values["listener_pending_events[backfill]"] == 1
    assert values["listener_oldest_pending_seconds[live]"] > 0
    assert values["listener_parked_events"] == 1
    assert (endpoint.status("/readyz"), endpoint.status("/healthz")) == (200, 200)
    # A check of a misspelt path would else never fail.
    assert endpoint.status("/health") == 404


def test_the_age_of_what_waits_is_told_by_lane(database: Database) -> None:
    """The alert is about the live one; a backfill may take days."""
    live, old = database.insert("new", "old")
    database.forget_queue()
    database.rows(
        "insert into listener.queue (event_id, lane, queued_at) "
        "values (%s, 0, now() - interval '100 s'), (%s, 1, now() - interval '1 day')",
        live,
        old,
    )
    registry = make_registry(database.settings)

    age = partial(registry.get_sample_value, "listener_oldest_pending_seconds")

    assert 100 <= (age({"lane": "live"}) or 0) < 86_400 <= (age({"lane": "backfill"}) or 0)


def test_a_terminated_connection_is_a_reconnect(
    database: Database, watch: Callable[..., Endpoint]
) -> None:
    """One for each time that the session had to be made anew."""
    endpoint = watch(database)
    wait_until(lambda: endpoint.status("/readyz") == 200)
    assert endpoint.value("listener_reconnects_total") == 0

    database.terminate("listener-work")

    wait_until(lambda: endpoint.value("listener_reconnects_total") == 1)
    wait_until(lambda: endpoint.status("/readyz") == 200)


def test_an_event_of_a_dead_worker_is_a_lease_expiry(
    database: Database, watch: Callable[..., Endpoint]
) -> None:
    """Counted by the worker that claims it."""
    doomed = watch(database)
    database.insert("slow")
    doomed.worker.wait_for("event=encoding_slowly")
    os.kill(doomed.worker.process.pid, signal.SIGKILL)

    heir = watch(database, SLOW_SECONDS="0")

    wait_until(database.embedded)
    wait_until(lambda: heir.value("listener_lease_expiries_total") == 1)


def test_ready_only_while_the_database_is_there(
    proxy: Proxy, database: Database, watch: Callable[..., Endpoint]
) -> None:
    """Not before LISTEN is live, not after it is lost; healthy throughout, and scraped."""
    proxy.refuses = True
    endpoint = watch(database.through(proxy.port))
    endpoint.worker.wait_for("event=connection_lost")

    assert (endpoint.status("/readyz"), endpoint.status("/healthz")) == (503, 200)
    values = endpoint.values()
    assert (values["listener_ready"], values["listener_database_up"]) == (0, 0)
    assert values["listener_events_stored_total"] == 0
    assert "listener_parked_events" not in values

    proxy.refuses = False
    wait_until(lambda: endpoint.status("/readyz") == 200, 30)
    assert endpoint.value("listener_ready") == 1

    proxy.refuses = True
    proxy.reset()
    wait_until(lambda: endpoint.status("/readyz") == 503)
    assert endpoint.status("/healthz") == 200

    proxy.refuses = False
    wait_until(lambda: endpoint.status("/readyz") == 200, 30)
    wait_until(lambda: endpoint.value("listener_database_up") == 1)


def test_a_scrape_comes_though_the_database_is_silent(
    proxy: Proxy, database: Database, watch: Callable[..., Endpoint]
) -> None:
    """The counters don't wait for one that neither answers nor refuses."""
    endpoint = watch(database.through(proxy.port))
    wait_until(lambda: endpoint.status("/readyz") == 200)

    proxy.black_hole()

    values = endpoint.values()
    assert values["listener_database_up"] == 0
    assert values["listener_reconnects_total"] == 0


def test_a_database_that_has_gone_is_not_up(
    proxy: Proxy, database: Database, watch: Callable[..., Endpoint]
) -> None:
    """However often it answered before; an alert asks for no more."""
    endpoint = watch(database.through(proxy.port))
    wait_until(lambda: endpoint.value("listener_database_up") == 1)

    proxy.refuses = True
    proxy.reset()

    wait_until(lambda: endpoint.value("listener_database_up") == 0)


def test_a_scrape_that_the_database_fails_shows_no_old_number(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its error is."""
    monkeypatch.setattr("listener.metrics._GAUGES_SECONDS", 0.0)
    registry = make_registry(database.settings)
    assert registry.get_sample_value("listener_database_up") == 1

    monkeypatch.setattr(queries, "GAUGES", "select 1 / 0")

    wait_until(lambda: registry.get_sample_value("listener_database_up") == 0)


def test_a_scrape_that_is_never_answered_is_given_up(
    proxy: Proxy, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else there would be no numbers of the database until a restart."""
    for name, seconds in (
        ("_GAUGES_SECONDS", 0.0),
        ("_PATIENCE_SECONDS", 0.5),
        ("_GAUGES_LIMIT", 3),
        ("_GRACE_SECONDS", 1.0),
    ):
        monkeypatch.setattr(f"listener.metrics.{name}", seconds)
    registry = make_registry(database.through(proxy.port).settings)
    is_up = partial(registry.get_sample_value, "listener_database_up")
    wait_until(is_up)

    with database.session() as other, other.transaction():
        other.execute("lock table listener.queue in access exclusive mode")
        wait_until(lambda: not is_up() and database.waits("listener-metrics"))
        proxy.black_hole()
    proxy.heal()

    wait_until(is_up)


def test_no_scrape_waits_on_at_the_server_for_somebodys_lock(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There would be one more of them with each."""
    monkeypatch.setattr("listener.metrics._GAUGES_LIMIT", 0.2)
    sessions = (
        "select count(*) from pg_stat_activity where datname = current_database() "
        "and application_name = 'listener-metrics'"
    )

    with database.session() as migration, migration.transaction():
        migration.execute("lock table listener.queue in access exclusive mode")
        assert make_registry(database.settings).get_sample_value("listener_database_up") == 0

        wait_until(lambda: not database.value(sessions))


def threads_of_scrapes() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "metrics"}


def test_of_scrapes_that_get_no_answer_only_the_first_asks(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each would leave a thread and a connection behind until the database speaks again."""
    monkeypatch.setattr("listener.metrics._PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr("listener.metrics._GAUGES_SECONDS", 0.0)
    with database.session() as migration, migration.transaction():
        migration.execute("lock table listener.queue in access exclusive mode")
        registry = make_registry(database.settings)
        # Those of an earlier test may not have ended yet.
        before = threads_of_scrapes()

        for _ in range(3):
            assert registry.get_sample_value("listener_database_up") == 0

        assert len(threads_of_scrapes() - before) == 1
    wait_until(lambda: not threads_of_scrapes())


def test_the_database_is_asked_again_only_when_its_answer_is_old(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two scrapers, or an impatient one, cost it one's queries, also where it fails them."""
    monkeypatch.setattr("listener.metrics._PATIENCE_SECONDS", DEADLINE_SECONDS)
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("listener.metrics.time", SimpleNamespace(monotonic=lambda: clock.now))
    asked: list[str] = []

    def counted(*arguments: object, **options: object) -> object:
        asked.append("once more")
        return connect(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("listener.metrics.connect", counted)
    monkeypatch.setattr(health, "serves", "a model")
    registry = make_registry(database.settings)
    is_up = partial(registry.get_sample_value, "listener_database_up")

    wait_until(lambda: registry.get_sample_value("listener_coverage_ratio") == 1)
    assert len(asked) == 2, "the numbers and, on its own, the coverage"

    # Not yet of the coverage, which takes longer than the rest.
    clock.now = 30.0
    assert [is_up(), is_up()] == [1, 1]
    assert len(asked) == 3

    monkeypatch.setattr(queries, "GAUGES", "select 1 / 0")
    clock.now = 60.0
    assert [is_up(), is_up()] == [0, 0]
    assert len(asked) == 4


def test_a_loop_that_hangs_is_not_healthy(
    database: Database, watch: Callable[..., Endpoint]
) -> None:
    """Though its process lives and answers."""
    endpoint = watch(database, HANG_AT="before the write")
    wait_until(lambda: endpoint.status("/readyz") == 200)
    assert endpoint.status("/healthz") == 200

    database.insert("never written")

    wait_until(lambda: endpoint.status("/healthz") == 503)
    assert endpoint.status("/readyz") == 503
    assert endpoint.worker.process.poll() is None


def test_without_a_port_nothing_listens(
    database: Database, spawn: Spawn, watch: Callable[..., Endpoint]
) -> None:
    """Off by default; where it is on, it is seen by the same look."""
    worker = spawn(database.settings, "run", module="tests.tiny_worker")
    worker.wait_for("event=listening")
    endpoint = watch(database)

    assert listening_sockets(worker.process.pid) == []
    (address,) = listening_sockets(endpoint.worker.process.pid)
    assert address.endswith(f":{endpoint.port:04X}")


def test_without_a_port_nothing_is_imported() -> None:
    """The lean start stays lean."""
    code = (
        "import sys, listener.cli, listener.service; "
        "print([m for m in sys.modules if 'prometheus' in m or 'wsgiref' in m])"
    )

    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert shown.stdout.strip() == "[]"


def test_between_scrapes_no_connection_is_held(
    database: Database, watch: Callable[..., Endpoint]
) -> None:
    """It is made for the scrape, and gone after it."""
    endpoint = watch(database)
    wait_until(lambda: endpoint.value("listener_coverage_ratio") == 1)

    held = "select count(*) from pg_stat_activity where application_name = 'listener-metrics'"
    wait_until(lambda: database.value(held) == 0)


def test_run_once_opens_no_port(static: Database) -> None:
    """A timer's sweep may share the settings of the service that runs beside it."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        # It would end with exit 2, and the test with it.
        listener(static.settings, "run", "--once", METRICS_PORT=str(taken.getsockname()[1]))


@pytest.mark.parametrize(
    ("host", "port", "codes"),
    # Whether a name is unknown or nobody can be asked is up to the machine.
    [("127.0.0.1", None, {2}), ("192.0.2.1", 20_000, {1}), ("no.such.invalid", 20_000, {1, 2})],
)
def test_a_port_that_is_not_to_be_had_is_one_clear_line(
    database: Database, host: str, port: int | None, codes: set[int]
) -> None:
    """Exit 2 where it is taken; 1, to be started again, where the address may come later."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = port or taken.getsockname()[1]

        finished = listener(
            database.settings, "run", check=False, METRICS_HOST=host, METRICS_PORT=str(port)
        )

    assert finished.returncode in codes
    (line,) = finished.stderr.splitlines()
    assert f"METRICS_HOST={host} METRICS_PORT={port} can't be listened on" in line


@pytest.mark.parametrize(
    ("number", "code"),
    [(socket.EAI_AGAIN, 1), (socket.EAI_NONAME, 2)],
    ids=["nobody answers", "no such name"],
)
def test_a_name_that_nobody_can_be_asked_for_may_be_known_later(
    monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    """As when a machine starts; on exit 2 the service would stay down."""

    def fails(*_: object, **__: object) -> None:
        raise socket.gaierror(number, "why")

    monkeypatch.setattr("socket.getaddrinfo", fails)

    with pytest.raises(ListenerError, match="can't be listened on") as refused:
        _listen(Settings(metrics_port=free_port()), demo_app)

    assert refused.value.exit_code == code


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_the_port_is_opened_on_an_address_of_either_version(
    monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    """A host may have IPv6 only; and nobody is asked for its name, which may take seconds."""
    monkeypatch.setattr("socket.getfqdn", None)
    if ":" in host and not Path("/proc/net/if_inet6").exists():
        pytest.skip("no IPv6 on this machine")
    settings = Settings(metrics_host=host, metrics_port=free_port())

    with _listen(settings, demo_app) as server:
        socket.create_connection((host, server.server_port), DEADLINE_SECONDS).close()


def test_a_client_that_leaves_is_no_line_in_the_log(
    database: Database, watch: Callable[..., Endpoint]
) -> None:
    """As the check of a load balancer, every few seconds."""
    endpoint = watch(database)
    for _ in range(3):
        client = socket.create_connection(("127.0.0.1", endpoint.port))
        client.sendall(b"GET ")
        # Closed so, it sends a reset.
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
    assert endpoint.status("/metrics") == 200

    assert endpoint.worker.end() == 0
    assert "Traceback" not in endpoint.worker.output()
    # Nor is a scrape.
    assert "GET" not in endpoint.worker.output()


def test_a_client_that_says_nothing_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has a thread."""
    monkeypatch.setattr(_Handler, "timeout", min(_Handler.timeout, 0.05))
    settings = Settings(metrics_port=free_port())

    with (
        _listen(settings, demo_app) as server,
        socket.create_connection(("127.0.0.1", server.server_port), DEADLINE_SECONDS) as client,
    ):
        server.handle_request()

        assert client.recv(1) == b""


def test_where_there_are_many_clients_another_one_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each has a thread for as long as it likes."""
    monkeypatch.setattr("threading.active_count", lambda: _MOST_THREADS)
    monkeypatch.setattr(_Handler, "timeout", 3 * DEADLINE_SECONDS)

    with (
        _listen(Settings(metrics_port=free_port()), demo_app) as server,
        socket.create_connection(("127.0.0.1", server.server_port), DEADLINE_SECONDS) as client,
    ):
        server.handle_request()

        assert client.recv(1) == b""


def test_no_client_holds_up_the_end_of_the_process() -> None:
    """One that says a byte now and then would do so for ever; Python waits for other threads."""
    before = set(threading.enumerate())
    with (
        _listen(Settings(metrics_port=free_port()), demo_app) as server,
        socket.create_connection(("127.0.0.1", server.server_port), DEADLINE_SECONDS),
    ):
        server.handle_request()

        (client,) = set(threading.enumerate()) - before
        assert client.daemon


@pytest.mark.parametrize("host", ["127.0.0.1", "x" * 64])
def test_a_port_beyond_all_ports_and_a_name_that_can_be_no_hosts_are_refused(host: str) -> None:
    """As a port that is taken."""
    with pytest.raises(ConfigError, match="can't be listened on"):
        start_endpoint(Settings(metrics_host=host, metrics_port=99_999))


def test_a_service_that_loads_its_model_is_healthy_and_not_ready() -> None:
    """Or it would be killed for it."""
    loading = Health()

    assert (loading.is_stalled, loading.is_ready) == (False, False)


def test_without_the_extra_the_message_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the way to do without."""
    monkeypatch.setitem(sys.modules, "prometheus_client", None)

    with pytest.raises(ConfigError, match=r"iot-event-listener\[metrics\].*METRICS_PORT=0"):
        start_endpoint(Settings(metrics_port=free_port()))


@pytest.mark.parametrize("reaches", [True, False], ids=["server", "no server"])
def test_no_page_shows_the_password(
    database: Database, watch: Callable[..., Endpoint], reaches: bool
) -> None:
    """Whether the database answers or not."""
    database.rows(f"create role watched login superuser password '{PASSWORD}'")
    try:
        url = database.owner.database_url.replace("postgres@", f"watched:{PASSWORD}@")
        assert PASSWORD in url
        if not reaches:
            url = f"postgresql://watched:{PASSWORD}@127.0.0.1:1/x"
        endpoint = watch(database.with_settings(database_url=url), LOG_LEVEL="debug")
        wait_until(lambda: endpoint.value("listener_database_up") == reaches)

        pages = "".join(
            endpoint.get(path)[1] for path in ("/metrics", "/healthz", "/readyz", "/other")
        )
    finally:
        database.rows("drop role watched")

    assert "listener_ready" in pages
    assert PASSWORD not in pages + endpoint.worker.output()


def listening_sockets(pid: int) -> list[str]:
    """The local addresses that a process accepts connections on, as the kernel writes them."""
    inodes = {str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()}
    rows = [
        line.split()
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]
    ]
    return [row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in inodes]


# --- what is written about them ------------------------------------------------------------------


def metric_of(name: str) -> str:
    """A histogram's samples belong to one metric."""
    return re.sub(r"_(bucket|count|sum)$", "", name)


def test_the_readme_the_dashboard_and_the_alerts_name_the_metrics_that_are_exposed(
    database: Database, watch: Callable[..., Endpoint]
) -> None:
    """The README each of them, with its type and meaning; the other two no other."""
    endpoint = watch(database)
    wait_until(lambda: endpoint.value("listener_coverage_ratio") == 1)

    text = endpoint.get("/metrics")[1]

    exposed = [
        [f"`{name}`", kind, meaning]
        for name, meaning, kind in re.findall(
            r"^# HELP (\S+) (.+)\n# TYPE \S+ (\S+)", text, re.MULTILINE
        )
    ]
    names = {metric_of(name.strip("`")) for name, *_ in exposed}
    assert table(README, "Metric") == exposed
    for file in ("dashboard.json", "alerts.yaml"):
        found = re.findall(r"\blistener_\w+", (MONITORING / file).read_text("utf-8"))
        assert {metric_of(name) for name in found} <= names, file


def test_each_alert_says_what_to_do_and_where_to_read_on() -> None:
    """And its reason stands above it."""
    text = (MONITORING / "alerts.yaml").read_text("utf-8")
    (group,) = yaml.safe_load(text)["groups"]
    headings = {
        heading.lower().replace(" ", "-") for heading in re.findall(r"^#+ (.*)$", README, re.M)
    }

    for rule in group["rules"]:
        assert rule["annotations"].keys() == {"summary", "action", "runbook"}
        assert rule["annotations"]["runbook"].removeprefix("README.md#") in headings
    assert len(re.findall(r"#.*\n +- alert:", text)) == len(group["rules"])


def test_the_dashboard_is_json_and_each_panel_asks_something() -> None:
    """Of the data source that is chosen on import."""
    dashboard = json.loads((MONITORING / "dashboard.json").read_text("utf-8"))

    for panel in dashboard["panels"]:
        assert panel["description"]
        assert all(target["expr"] for target in panel["targets"])
        assert panel["datasource"]["uid"] == "${datasource}"
