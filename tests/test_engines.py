"""Engines: each gives the same vectors; one rule chooses; none loads what it does not use."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from tokenizers import Tokenizer

from listener import embedder as embedder_module
from listener import engine_openvino
from listener.config import Settings
from listener.convert import convert
from listener.counters import counters
from listener.embedder import Embedder, choose_engine, load_embedder
from listener.encoding import Encoder
from listener.engine_openvino import OpenVinoEmbedder
from listener.engine_torch import SentenceTransformersEmbedder
from listener.errors import ConfigError
from listener.model import locate
from listener.passes import plan_passes
from tests.harness import Database, empty_folder, environment, listener

EXACT = 0.9999
HEAVY = ("torch", "transformers", "sentence_transformers", "openvino_telemetry")


def mixed_texts(count: int) -> list[str]:
    """Of 0 to beyond 512 words, most of them short, in several scripts and cases."""
    chance = random.Random(11)  # noqa: S311  the same texts each time
    words = [
        "pump",
        "Valve",
        "LEAKING",
        "71.5",
        "°C",
        "door-left",
        "open",
        "gateway,",
        "lost;",
        "offline?",
        "it's",
        "Überdruck",
        "naïve",
        "温度",
        "过高",
        "насос",
        "горячий",
        "🚰",
        "🔥",
        "kühl",
        "é",
        "\u200b",
        "reading=0x1F",
        "antidisestablishmentarianism",
    ]
    lengths = [chance.choice((3, 5, 8, 13, 40)) for _ in range(count - 4)] + [0, 250, 256, 700]
    return [chance.choice((" ", "  ", "\n")).join(chance.choices(words, k=n)) for n in lengths]


def encoded(embedder: Embedder, texts: list[str]) -> NDArray[np.float32]:
    """As the service does it: pass by pass, each of like lengths."""
    vectors = np.zeros((len(texts), 384), np.float32)
    for indices in plan_passes(embedder.lengths(texts), 1024):
        vectors[indices] = embedder.encode([texts[index] for index in indices])
    return vectors


@pytest.fixture(scope="module")
def engines(converted: Settings, static_model: Path) -> dict[str, Embedder]:
    """Each, with a model that cuts long texts; real weights but for the static embedding."""
    names = ("torch", "openvino")
    engines = {name: load_embedder(replace(converted, engine=name)) for name in names}
    return engines | {"static": load_embedder(Settings(embedding_model=str(static_model)))}


def least_cosine(settings: Settings, texts: list[str]) -> float:
    """Between the engine of the settings and torch, over the texts."""
    torch_vectors = encoded(load_embedder(replace(settings, engine="torch")), texts)
    vectors = encoded(load_embedder(settings), texts)
    assert vectors.shape == (len(texts), 384)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    return float((vectors * torch_vectors).sum(axis=1).min())


# --- the same vectors ----------------------------------------------------------------------------


def test_openvino_gives_the_vectors_of_torch_for_a_thousand_texts(converted: Settings) -> None:
    """Real weights, mixed lengths and scripts, empty and cut ones among them."""
    assert least_cosine(replace(converted, engine="openvino"), mixed_texts(1000)) >= EXACT


def test_openvino_gives_the_vectors_of_torch_for_gte_smalls_fp16_files(
    gte_small_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Converted to and computed in float32; 12 layers, 512 tokens."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(gte_small_cache))
    settings = Settings(model_cache=tmp_path, engine="openvino")

    folder = convert(settings)

    assert (folder / engine_openvino.WEIGHTS).stat().st_size > 130_000_000
    assert any((folder / engine_openvino.COMPILED).iterdir()), "compiled at each start"
    assert least_cosine(settings, mixed_texts(100)) >= EXACT
    assert load_embedder(settings).max_tokens == 512


def test_a_static_embedding_gives_a_text_the_same_vector_alone_and_among_others(
    static_model: Path,
) -> None:
    """Also where a token comes three times, and so counts three times."""
    embedder = load_embedder(Settings(embedding_model=str(static_model)))
    texts = ["pump pump pump hot", "door"]

    alone = np.concatenate([embedder.encode([text]) for text in texts])

    np.testing.assert_allclose(embedder.encode(texts), alone, atol=1e-6)


BLOB = "QUJDRGVm" * 2_000
LONG_TEXTS = {
    "words": "pump 7 is hot, " * 3_000,
    "lines": "pump\nhot\n" * 3_000,
    "a blob, then words": f"photo {BLOB} of the leaking valve " + "at the gate " * 3_000,
    "a blob over the cut": "valve " * 600 + BLOB + " leaks " * 3_000,
    "spaces, then words": " " * 20_000 + "pump hot " * 3_000,
    "spaces, then few words": " " * 20_000 + "pump hot",
    "controls that don't part words": "pump\x1chot " * 3_000,
    "without a space": "温度过高。" * 4_000,
    "one word": BLOB * 3,
}


@pytest.mark.parametrize("engine", ["torch", "openvino", "static"])
@pytest.mark.parametrize("text", LONG_TEXTS.values(), ids=LONG_TEXTS)
def test_a_long_texts_vector_is_that_of_all_of_it(
    engines: dict[str, Embedder], engine: str, text: str
) -> None:
    """Though a tokenizer reads no more of it than fills the model."""
    embedder = engines[engine]
    encoder = Encoder(lambda: embedder, cache_texts=0)

    (vector,) = encoder.encode([text]).results

    encoder.close()
    np.testing.assert_array_equal(vector, embedder.encode([text])[0])


def test_a_static_embedding_in_numpy_gives_the_vectors_of_torch_for_a_thousand_texts(
    static_model: Path,
) -> None:
    """The same tokens, the same cut, the same mean."""
    settings = Settings(embedding_model=str(static_model))
    texts = [text for text in mixed_texts(1000) if text]

    assert load_embedder(settings).engine == "static"
    assert least_cosine(settings, texts) >= EXACT


def test_a_text_without_tokens_is_zeros_in_a_static_embedding_and_spoils_no_other(
    static_model: Path,
) -> None:
    """First, last and between others: each row is its own text's."""
    embedder = load_embedder(Settings(embedding_model=str(static_model)))
    texts = ["", "pump hot", "", "", "door", ""]

    vectors = embedder.encode(texts)

    alone = np.concatenate([embedder.encode([text]) for text in texts])
    np.testing.assert_allclose(vectors, alone, atol=1e-6)
    assert not vectors[[0, 2, 3, 5]].any()


def test_a_static_embedding_averages_no_padding(static_model: Path, tmp_path: Path) -> None:
    """Though its tokenizer was saved with it."""
    shutil.copytree(static_model, tmp_path / "padded")
    tokenizer = Tokenizer.from_file(str(static_model / "tokenizer.json"))
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(tmp_path / "padded" / "tokenizer.json"))

    expected, found = (
        load_embedder(Settings(embedding_model=str(folder))).encode(["pump hot"])
        for folder in (static_model, tmp_path / "padded")
    )

    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_openvino_gives_a_text_the_same_vector_alone_and_among_others(converted: Settings) -> None:
    """Order and padding change nothing."""
    embedder = load_embedder(replace(converted, engine="openvino"))
    texts = mixed_texts(60)

    alone = np.concatenate([embedder.encode([text]) for text in texts])

    np.testing.assert_allclose(embedder.encode(texts), alone, atol=1e-5)


def test_both_engines_count_a_texts_tokens_alike(converted: Settings) -> None:
    """`listener show` says the same; a count leaves the cut as it was."""
    torch_engine = load_embedder(replace(converted, engine="torch"))
    fast = load_embedder(replace(converted, engine="openvino"))
    texts = mixed_texts(20)

    counts = [fast.count_tokens(text) for text in texts]
    assert counts == [torch_engine.count_tokens(text) for text in texts]
    assert max(counts) > 256
    assert fast.lengths(texts) == [min(count, 256) for count in counts]
    assert torch_engine.lengths(texts) == fast.lengths(texts)
    assert fast.max_tokens == torch_engine.max_tokens == 256
    assert fast.encode([texts[-1]]).shape == (1, 384)


@pytest.mark.parametrize("engine", ["torch", "openvino", "static"])
def test_each_engine_counts_the_texts_that_it_cuts(
    engines: dict[str, Embedder], engine: str
) -> None:
    """Long in bytes is not long in tokens; asking for a length counts nothing."""
    embedder = engines[engine]
    limit = embedder.max_tokens or 0
    texts = ["antidisestablishmentarianism " * 12, "pump " * (limit - 2), "pump " * (limit + 1)]
    before = counters.texts_truncated

    embedder.lengths(texts)
    for text in texts:
        embedder.encode([text])
    embedder.encode(texts)

    assert (embedder.engine, counters.texts_truncated - before) == (engine, 2)


def test_the_fingerprint_names_the_precision_and_no_engine(converted: Settings) -> None:
    """To switch between torch and OpenVINO embeds nothing again."""
    fast = load_embedder(replace(converted, engine="openvino")).fingerprint

    assert fast == load_embedder(replace(converted, engine="torch")).fingerprint
    assert fast.endswith("/fp32")
    assert locate(replace(converted, precision="bf16")).fingerprint == fast[:-4] + "bf16"


# --- which engine --------------------------------------------------------------------------------


def chosen(settings: Settings) -> str:
    return choose_engine(settings, locate(settings))


def test_auto_takes_openvino_only_once_the_model_is_converted(
    converted: Settings, tmp_path: Path
) -> None:
    """Without a conversion it is torch, and nothing is converted by itself."""
    unconverted = replace(converted, model_cache=tmp_path)

    assert chosen(converted) == "openvino"
    assert chosen(unconverted) == "torch"
    assert chosen(replace(converted, engine="torch")) == "torch"
    assert list(tmp_path.iterdir()) == []


def test_auto_takes_torch_where_openvino_is_not_installed(
    converted: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A conversion of before doesn't matter."""
    monkeypatch.setattr(engine_openvino, "is_installed", lambda: False)

    assert chosen(converted) == "torch"
    with pytest.raises(
        ConfigError, match=r"not installed; pip install 'iot-event-listener\[fast\]"
    ):
        load_embedder(replace(converted, engine="openvino"))


@pytest.mark.parametrize(
    ("kind", "config", "weights", "engine"),
    [
        ("float32", {}, None, "static"),
        ("bfloat16", {}, None, "torch"),
        ("float32", {"prompts": {"a": "query: "}, "default_prompt_name": "a"}, None, "torch"),
        ("float32", {}, b"truncated", "torch"),
    ],
    ids=["as it is", "numbers that numpy lacks", "with a prompt", "damaged"],
)
def test_a_static_embedding_that_only_torch_can_judge_is_left_to_it(
    tmp_path: Path, kind: str, config: dict[str, object], weights: bytes | None, engine: str
) -> None:
    """It reads more, or says what is wrong."""
    (tmp_path / "modules.json").write_text('[{"type": "a.StaticEmbedding", "path": ""}]')
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(config))
    table = torch.zeros((2, 384), dtype=getattr(torch, kind))
    save_file({"embedding.weight": table}, tmp_path / "model.safetensors")
    if weights:
        (tmp_path / "model.safetensors").write_bytes(weights)

    assert chosen(Settings(embedding_model=str(tmp_path))) == engine


@pytest.mark.parametrize(
    ("build", "visible", "engine"),
    [("2.13.0", "0", "torch"), ("2.13.0", "", "openvino"), ("2.13.0+cpu", "0", "openvino")],
)
def test_auto_takes_torch_where_torch_can_use_a_gpu(
    converted: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    build: str,
    visible: str,
    engine: str,
) -> None:
    """A device that is not hidden, and a build of torch for it."""
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(embedder_module, "_DEVICES", tmp_path)
    monkeypatch.setattr("listener.embedder.metadata.version", lambda _: build)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    assert chosen(converted) == engine


def test_openvino_without_a_conversion_names_the_command(
    converted: Settings, tmp_path: Path
) -> None:
    """Exit 2, one line."""
    settings = replace(converted, engine="openvino", model_cache=tmp_path)

    finished = listener(settings, "run", check=False)

    assert finished.returncode == 2
    assert "run `listener model convert`" in finished.stderr
    assert len(finished.stderr.splitlines()) == 1


def test_bf16_is_refused_by_a_cpu_or_an_engine_without_it(
    converted: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never a fp32 vector under the name of bf16."""
    settings = replace(converted, precision="bf16")
    monkeypatch.setattr("openvino.Core.get_property", lambda *_: ["FP32"])

    with pytest.raises(ConfigError, match="this CPU has no bf16"):
        load_embedder(settings)
    with pytest.raises(ConfigError, match="PRECISION=bf16 is for OpenVINO"):
        load_embedder(replace(settings, engine="torch"))


# --- a long run ----------------------------------------------------------------------------------


_ENCODE_MANY_SHAPES = """
import ctypes
import os
import random
from pathlib import Path
from listener import engine_openvino
from listener.config import Settings
from listener.embedder import load_embedder

def resident():
    # What was freed, the allocator may have kept.
    ctypes.CDLL(None).malloc_trim(0)
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024

# So that few are many; not what the tests' own process has set.
engine_openvino._SHAPES = 32
os.environ.pop("ONEDNN_PRIMITIVE_CACHE_CAPACITY", None)
embedder = load_embedder(Settings.from_environment(os.environ))
shapes = [(texts, words) for texts in range(1, 9) for words in range(1, 31)]
random.Random(1).shuffle(shapes)
embedder.encode(["pump " * 30] * 8)
print(resident())
for number, (texts, words) in enumerate(shapes, 1):
    embedder.encode(["pump " * words] * texts)
    if number % 120 == 0:
        print(resident())
"""


def test_openvinos_memory_stops_growing_with_the_shapes_that_it_has_met(
    converted: Settings,
) -> None:
    """Of 240 shapes, all new, the second half adds less than a quarter of what the first did."""
    finished = subprocess.run(
        [sys.executable, "-c", _ENCODE_MANY_SHAPES],
        env=environment(replace(converted, engine="openvino")),
        cwd=empty_folder(),
        capture_output=True,
        text=True,
        check=True,
    )

    mebibytes = [float(line) for line in finished.stdout.splitlines()]
    start, middle, end = mebibytes
    assert end - middle < (middle - start) / 4, mebibytes


# --- a lean start --------------------------------------------------------------------------------


_RUN_AND_TELL = f"""
import sys
from listener.cli import main
try:
    main()
except SystemExit as end:
    loaded = [name for name in {HEAVY!r} if sys.modules.get(name)]
    print(f"loaded: {{loaded}}, exit: {{end.code or 0}}")
"""


@pytest.mark.parametrize("model", ["converted", "static"])
@pytest.mark.parametrize(
    "arguments", [("run", "--once"), ("check",), ("search", "pump"), ("show",)]
)
def test_no_command_imports_torch_with_a_converted_or_static_model(
    database: Database,
    converted: Settings,
    static_model: Path,
    model: str,
    arguments: tuple[str, ...],
) -> None:
    """Nor what comes with it, nor what would report to the makers of OpenVINO."""
    path = str(static_model) if model == "static" else converted.embedding_model
    settings = replace(database.settings, embedding_model=path, model_cache=converted.model_cache)
    event_id = str(database.insert("pump hot")[0])
    if arguments == ("search", "pump"):
        listener(settings, "run", "--once")

    finished = subprocess.run(
        [sys.executable, "-c", _RUN_AND_TELL, *arguments, *([event_id] * (arguments == ("show",)))],
        env=environment(settings),
        cwd=empty_folder(),
        capture_output=True,
        text=True,
        check=True,
    )

    assert finished.stdout.splitlines()[-1] == "loaded: [], exit: 0", finished.stderr


def test_a_compiled_model_that_can_not_be_used_is_compiled_anew(
    converted: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one of another CPU in a folder that is closed to the service's account."""
    core = engine_openvino.load_openvino().Core
    compile_model = core.compile_model

    def refused(self: object, graph: str, device: str, options: dict[str, object]) -> object:
        if "CACHE_DIR" in options:
            raise RuntimeError("can't open the cache")
        return compile_model(self, graph, device, options)

    monkeypatch.setattr(core, "compile_model", refused)

    assert load_embedder(replace(converted, engine="openvino")).encode(["a"]).shape == (1, 384)


def test_a_model_that_finds_no_memory_does_not_keep_the_service_down(
    monkeypatch: pytest.MonkeyPatch, converted: Settings, static_model: Path
) -> None:
    """Exit 2 would; started again a moment later, it may find some."""

    def no_memory(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(OpenVinoEmbedder, "_require_known_vectors", no_memory)
    monkeypatch.setattr("listener.engine_static.Tokenizer.from_file", no_memory)
    monkeypatch.setattr(SentenceTransformersEmbedder, "_compute", no_memory)

    for settings in (
        converted,
        Settings(embedding_model=str(static_model)),
        Settings(embedding_model=str(static_model), engine="torch"),
    ):
        with pytest.raises(MemoryError):
            load_embedder(settings)
