"""Fixtures: an ephemeral server a process, an installed database a test, models of every shape."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import psycopg
import pytest

from bench import models
from bench.devices import read_events
from listener.alone import alone
from listener.config import GTE_SMALL_REVISION, Settings
from listener.database import connect
from listener.embedded import Server, binaries
from listener.errors import ConfigError
from listener.model import locate
from tests.harness import (
    Command,
    Database,
    NewDatabase,
    Spawn,
    environment,
    free_port,
    install_demo,
)
from tests.own_server import MakeServer

# A shell starts what it runs in the background with SIGINT ignored, and so would be what we start.
signal.signal(signal.SIGINT, signal.default_int_handler)


def _programs() -> Path:
    """TEST_PG_BIN names another server's bin directory, to test another version."""
    return Path(os.environ["TEST_PG_BIN"]) if "TEST_PG_BIN" in os.environ else binaries()


def pytest_report_header() -> str:
    """The server's and pgvector's versions."""
    programs = _programs()
    version = subprocess.run(
        [programs / "postgres", "--version"], capture_output=True, text=True, check=True
    ).stdout.strip()
    control = next(programs.parent.rglob("vector.control")).read_text()
    found = re.search(r"default_version = '(.+)'", control)
    return f"{version}, pgvector {found[1] if found else 'unknown'}"


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """An ephemeral server on a free port, without fsync: what dies here is the process."""
    with ExitStack() as stack:
        yield _make_server(stack, _programs(), "max_prepared_transactions=5")


def _make_server(stack: ExitStack, programs: Path, *options: str) -> Server:
    # Not pytest's own directory, which is closed to the account that the server runs under.
    home = Path(tempfile.mkdtemp(prefix="listener-"))
    stack.callback(shutil.rmtree, home)
    made = Server.prepared(home, programs, free_port(), "fsync=off", *options)
    stack.callback(_stop_if_running, made)
    made.start()
    return made


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that other accounts may read, as they may not pytest's own."""
    with tempfile.TemporaryDirectory(prefix="listener-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture
def make_server(server: Server) -> Iterator[MakeServer]:
    """Servers of the test's own, to be broken; options as `-c` settings."""
    with ExitStack() as stack:
        yield partial(_make_server, stack, server.programs)


@pytest.fixture(scope="module")
def second_server(server: Server) -> Iterator[Server]:
    """A server for one file, for roles of other rights than the first has."""
    with ExitStack() as stack:
        yield _make_server(stack, server.programs)


def _stop_if_running(server: Server) -> None:
    if server.is_running():
        server.stop("immediate")


def create_database(server: Server, name: str, template: str = "template1") -> str:
    """Create a database. Returns its connection string."""
    with psycopg.connect(server.url(), autocommit=True) as admin:
        admin.execute(f'create database "{name}" template "{template}"'.encode())
    return server.url(name)


@pytest.fixture(scope="session")
def template(server: Server) -> str:
    """A database with the demo's iot_events and the listener installed."""
    url = create_database(server, "installed")
    with connect(Settings(database_url=url), "listener-test") as conn:
        install_demo(conn)
    return "installed"


_numbers = itertools.count(1)


@pytest.fixture
def new_database(server: Server) -> NewDatabase:
    """Make a database that goes when its block ends; empty unless a template is named."""

    @contextmanager
    def make(template: str = "template1") -> Iterator[str]:
        name = f"test_{next(_numbers)}"
        yield create_database(server, name, template)
        with psycopg.connect(server.url(), autocommit=True) as admin:
            admin.execute(f'drop database if exists "{name}" with (force)'.encode())

    return make


@pytest.fixture
def database(new_database: NewDatabase, template: str, tmp_path: Path) -> Iterator[Database]:
    """An installed, empty database; a long poll, so that a lost wake-up shows."""
    with new_database(template) as url:
        settings = Settings(
            database_url=url,
            reports_dir=tmp_path / "_reports",
            # Nobody's own converted models decide which engine is tested.
            model_cache=tmp_path / "models",
            poll_seconds=120.0,
            retry_seconds=0.05,
            lease_seconds=30.0,
        )
        with connect(settings, "listener-test") as conn:
            yield Database.owned(settings, conn)


@pytest.fixture
def spawn(tmp_path: Path) -> Iterator[Spawn]:
    """Start `listener` processes, or others of its kind; killed when the test ends."""
    started: list[Command] = []

    def start(
        settings: Settings, *arguments: str, module: str = "listener", **variables: str
    ) -> Command:
        log = tmp_path / f"listener-{len(started)}.log"
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                env=environment(settings, **variables),
                cwd=tmp_path,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
            )
        started.append(Command(process, log))
        return started[-1]

    yield start
    for command in started:
        command.process.kill()
        command.process.wait()


@pytest.fixture
def quick_reconnects(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wait before a new session does not grow where one is lost soon after the other."""
    monkeypatch.setattr("listener.service._BRIEF_SECONDS", 0.0)


@pytest.fixture(scope="session")
def minilm() -> Path:
    """Real 384-D weights."""
    return models.minilm()


@pytest.fixture(scope="session")
def static_model(tmp_path_factory: pytest.TempPathFactory, minilm: Path) -> Path:
    """A static-embedding model: no transformer, next to no cost."""
    import numpy as np
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(minilm / "tokenizer.json"))
    tokenizer.no_padding()
    weights = np.random.default_rng(1).standard_normal((tokenizer.get_vocab_size(), 384))
    folder = tmp_path_factory.mktemp("models") / "static"
    module = StaticEmbedding(tokenizer, embedding_weights=weights.astype(np.float32))
    SentenceTransformer(modules=[module], device="cpu").save(str(folder))
    return folder


@pytest.fixture
def static(database: Database, static_model: Path) -> Database:
    """The database with a model that real processes can load."""
    return database.with_settings(embedding_model=str(static_model))


@pytest.fixture(scope="session")
def gte_small_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub cache with a model of gte-small's shape: 12 layers, fp16 files, random weights."""
    home = tmp_path_factory.mktemp("hub")
    repository = home / "models--thenlper--gte-small"
    snapshot = repository / "snapshots" / GTE_SMALL_REVISION
    snapshot.parent.mkdir(parents=True)
    models.gte_shape(home).rename(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(GTE_SMALL_REVISION)
    return home


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory, minilm: Path) -> Settings:
    """Settings of the real weights, converted for OpenVINO; once for all processes of a run."""
    from listener.engine_openvino import is_ready

    folder = tmp_path_factory.getbasetemp()
    run = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    settings = Settings(embedding_model=str(minilm), model_cache=run / "model-cache")
    with alone(run / "conversion", lambda error: ConfigError(str(error)), waits=True):
        # To convert it again would prove it again.
        if not is_ready(locate(settings), settings):
            # Imports torch.
            from listener.convert import convert

            convert(settings)
    return settings


@pytest.fixture(scope="session")
def device_events() -> list[dict[str, str]]:
    """6,000 real device log events; skips where the data set isn't beside the clone."""
    return read_events() or pytest.skip("no data set of device events beside this clone")
