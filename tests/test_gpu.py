"""On a GPU: the vectors of the CPU, and a GPU that fails costs no event. `pytest -m gpu`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from listener.config import GTE_SMALL_REVISION, Settings
from listener.convert import convert
from listener.embedder import load_embedder
from tests.harness import Database, Spawn, listener, wait_until
from tests.test_engines import EXACT, encoded, least_cosine, mixed_texts

pytestmark = pytest.mark.gpu

POISON = "zqxjpoison"


@pytest.fixture(scope="module")
def model(gte_small_cache: Path) -> Path:
    """Of gte-small's shape, random weights."""
    return gte_small_cache / "models--thenlper--gte-small" / "snapshots" / GTE_SMALL_REVISION


@pytest.fixture(scope="module")
def broken_model(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its tokenizer knows a word that the transformer has no weights for."""
    from sentence_transformers import SentenceTransformer

    directory = tmp_path_factory.mktemp("models") / "broken"
    loaded = SentenceTransformer(str(model), device="cpu")
    assert loaded.tokenizer.add_tokens([POISON]) == 1
    loaded.save(str(directory))
    return directory


def test_a_gpu_gives_the_vectors_of_the_cpu(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So `model` beside them may be the same."""
    texts = mixed_texts(1000)
    on_gpu = load_embedder(Settings(embedding_model=str(model)))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    on_cpu = load_embedder(Settings(embedding_model=str(model)))

    assert on_gpu.engine.startswith("torch on ")
    assert on_cpu.engine == "torch"
    assert (encoded(on_gpu, texts) * encoded(on_cpu, texts)).sum(axis=1).min() >= EXACT
    assert on_gpu.fingerprint == on_cpu.fingerprint


def test_a_model_is_converted_beside_a_gpu_which_auto_takes_all_the_same(
    model: Path, tmp_path: Path
) -> None:
    """OpenVINO, which computes on the CPU, only where it is asked for."""
    settings = Settings(embedding_model=str(model), model_cache=tmp_path)
    convert(settings)

    assert load_embedder(settings).engine.startswith("torch on ")
    assert least_cosine(replace(settings, engine="openvino"), mixed_texts(100)) >= EXACT


def test_the_service_embeds_on_the_gpu_that_check_names(
    database: Database, model: Path, spawn: Spawn
) -> None:
    """From the insert to the vector, with real processes."""
    database = database.with_settings(embedding_model=str(model))

    assert "engine torch on " in listener(database.settings, "check").stdout
    ids = database.insert(*mixed_texts(300))
    worker = spawn(database.settings, "run")
    database.wait_for_rest(60)

    assert set(database.embedded()) == set(ids)
    assert worker.end() == 0


def test_a_text_that_breaks_the_gpu_is_parked_and_its_mates_are_stored(
    database: Database, broken_model: Path
) -> None:
    """After it nothing can be computed in that process, so it ends, and is started again."""
    database = database.with_settings(embedding_model=str(broken_model))
    ids = database.insert(*(POISON if number == 20 else str(number) for number in range(40)))
    runs = []

    def run() -> bool:
        runs.append(listener(database.settings, "run", "--once", check=False, MAX_ATTEMPTS="2"))
        return database.is_at_rest()

    wait_until(run, 300)

    assert [one.returncode for one in (runs[0], runs[-1])] == [1, 0]
    assert "the GPU failed (CUDA error" in runs[0].stderr
    assert "Traceback" not in runs[0].stderr
    assert set(database.embedded()) == set(ids) - {ids[20]}
    (row,) = database.queue()
    assert (row.event_id, row.is_parked) == (ids[20], True)
    assert "its worker died" in row.error


def test_a_gpu_whose_memory_another_holds_ends_the_service_to_be_started_again(
    database: Database, model: Path
) -> None:
    """Exit 1, so systemd tries again; one line says why; no event has lost an attempt."""
    import torch

    database = database.with_settings(embedding_model=str(model))
    database.insert("pump running hot")
    free, _ = torch.cuda.mem_get_info()
    held = torch.empty(free - (16 << 20), dtype=torch.uint8, device="cuda")

    finished = listener(database.settings, "run", "--once", check=False)
    del held
    torch.cuda.empty_cache()

    assert finished.returncode == 1
    last = finished.stderr.splitlines()[-1]
    assert last.startswith("listener: the GPU failed (")
    assert "Traceback" not in finished.stderr
    assert listener(database.settings, "run", "--once").returncode == 0
    assert len(database.embedded()) == 1
