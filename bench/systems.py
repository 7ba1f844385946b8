"""Everything that embeds events: the listener with each of its engines, and its peers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from bench.cluster import Cluster, install_listener
from bench.machine import processor_flags
from bench.peer_table import BATCHED
from bench.processes import LoggedProcess, clean_environment, peer, service
from bench.progress import BenchError
from listener.config import Settings

LISTENER = "listener"
# auto: what a service takes by itself, which for a static model is no other than torch's vectors.
AUTO, TORCH, OPENVINO = "auto", "torch", "openvino"
# The same engine with PRECISION=bf16, on a CPU that has it: other vectors.
OPENVINO_BF16 = "openvino-bf16"
_BF16_FLAGS = {"avx512_bf16", "amx_bf16"}

Worker = Callable[[Cluster, str, Path], AbstractContextManager[LoggedProcess]]


@dataclass(frozen=True)
class System:
    """What a table calls it, how it is installed in a database, and its worker.

    `slug` names its databases. `environment` is that of the listener's service.
    """

    name: str
    slug: str
    install: Callable[[str], None]
    command: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    def worker(
        self, cluster: Cluster, url: str, model: Path
    ) -> AbstractContextManager[LoggedProcess]:
        """Its process, from when it listens to the end of the block."""
        if self.command:
            return peer(cluster, url, model, *self.command)
        return service(cluster, url, model, self.environment)

    def settings(self, model: Path) -> Settings:
        """The listener's own, with which the bare model is loaded beside it."""
        return Settings.from_environment({"EMBEDDING_MODEL": str(model), **self.environment})


def _install_listener(url: str) -> None:
    # One column, as the peers.
    install_listener(url, ["message"])


def _peer(name: str, module: str, batched: bool) -> System:
    def install(url: str) -> None:
        # Not at the top: the extra `bench` may not be installed.
        import_module(module).install(url)

    if not batched:
        return System(name, module.rpartition(".")[2], install, (module,))
    slug = f"{module.rpartition('.')[2]}_batched"
    return System(f"{name}, batched", slug, install, (module, BATCHED))


_PEERS = (
    ("plain recipe", "bench.plain_recipe", None),
    ("procrastinate", "bench.peer_procrastinate", "procrastinate"),
    ("pgqueuer", "bench.peer_pgqueuer", "pgqueuer"),
)


def listener(engine: str = AUTO) -> System:
    """Ours with one of its engines."""
    name = LISTENER if engine in (AUTO, TORCH) else f"{LISTENER}, {engine}"
    settings = {"ENGINE": engine}
    if engine == OPENVINO_BF16:
        settings = {"ENGINE": OPENVINO, "PRECISION": "bf16"}
    return System(name, f"listener_{engine}", _install_listener, (), settings)


def peers() -> list[System]:
    """Those whose package is installed, each plain and batched by hand."""
    return [
        _peer(name, module, batched)
        for name, module, package in _PEERS
        for batched in (False, True)
        if package is None or find_spec(package)
    ]


def engines() -> list[str]:
    """Those that this machine has, and that are exact."""
    return [TORCH, *([OPENVINO] if find_spec("openvino") else [])]


def all_engines() -> list[str]:
    """Those of a reduced precision too."""
    has_bf16 = OPENVINO in engines() and not _BF16_FLAGS.isdisjoint(processor_flags())
    return [*engines(), *([OPENVINO_BF16] if has_bf16 else [])]


def what_is_missing() -> list[str]:
    """A sentence for each row or column that is left out here."""
    lacking = [name for name, _, package in _PEERS if package and not find_spec(package)]
    notes = [f"{name} is not installed (extra `bench`), so left out" for name in lacking]
    if OPENVINO not in engines():
        notes.append("the engine openvino is not installed (extra `fast`), so left out")
    if OPENVINO_BF16 not in all_engines():
        notes.append("no bf16: it takes the engine openvino and a CPU with AVX512-BF16 or AMX")
    return notes


def prepare(system: System, model: Path) -> None:
    """Convert the model where the engine needs it. Raises BenchError if that fails."""
    if system.environment.get("ENGINE") != OPENVINO:
        return
    environment = {**clean_environment(), **system.environment, "EMBEDDING_MODEL": str(model)}
    finished = subprocess.run(
        [sys.executable, "-m", "listener", "model", "convert"],
        cwd=model.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if finished.returncode != 0:
        raise BenchError(f"listener model convert failed:\n{finished.stdout}{finished.stderr}")
