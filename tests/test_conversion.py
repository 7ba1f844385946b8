"""`listener model convert`: all or nothing, proved, and never another model's."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from bench.models import gte_shape
from listener import engine_openvino
from listener.config import Settings
from listener.convert import convert
from listener.embedder import load_embedder
from listener.engine_openvino import converted_directory
from listener.errors import ConfigError
from listener.model import locate
from tests.harness import Spawn, empty_folder, environment, listener
from tests.test_engines import chosen


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Settings of a model that is soon converted, and isn't yet."""
    return Settings(embedding_model=str(gte_shape(tmp_path_factory.mktemp("models"), layers=1)))


# --- conversion ----------------------------------------------------------------------------------


def test_a_second_conversion_keeps_the_first(converted: Settings) -> None:
    """Harmless twice, at whatever precision it is to run: a service that does is not disturbed."""
    folder = converted_directory(locate(converted), converted)
    before = (folder / engine_openvino.MANIFEST).stat()

    assert convert(replace(converted, precision="bf16")) == folder
    after = (folder / engine_openvino.MANIFEST).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_conversion_is_open_to_the_services_account_but_for_what_links_lead_to(
    converted: Settings, tmp_path: Path
) -> None:
    """Whatever the umask of who converts; and the service's account may own the folder."""
    settings = replace(converted, model_cache=tmp_path / "cache")
    shutil.copytree(converted.model_cache, settings.model_cache)
    folder = converted_directory(locate(settings), settings)
    made = [folder.parent, folder, *folder.rglob("*")]
    for path in made:
        path.chmod(0o700 if path.is_dir() else 0o600)
    # Not made by the conversion.
    settings.model_cache.chmod(0o711)
    secret, elsewhere = tmp_path / "secret", tmp_path / "elsewhere"
    secret.touch(0o600)
    elsewhere.mkdir(0o700)
    (folder / "compiled" / "link").symlink_to(secret)
    (folder / "compiled" / "folder").symlink_to(elsewhere)
    # As one leaves it that is killed.
    (folder.parent / ".converting-killed" / "made").mkdir(parents=True)

    convert(settings)

    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert len(made) > 5
    assert all(path.stat().st_mode & 0o004 for path in made)
    modes = [path.stat().st_mode & 0o777 for path in (secret, elsewhere, settings.model_cache)]
    assert modes == [0o600, 0o700, 0o711]


def test_two_conversions_at_once_both_leave_the_model(
    one_layer: Settings, tmp_path: Path, spawn: Spawn
) -> None:
    """Neither takes the other's files away."""
    settings = replace(one_layer, model_cache=tmp_path / "cache")
    former = os.umask(0o077)
    conversions = [spawn(settings, "model", "convert") for _ in range(2)]
    os.umask(former)

    assert [one.process.wait(300) for one in conversions] == [0, 0], [
        one.output() for one in conversions
    ]
    assert load_embedder(replace(settings, engine="openvino")).engine == "openvino"
    # For the account of the service, too.
    assert all(path.stat().st_mode & 0o004 for path in (tmp_path / "cache").rglob("*"))
    assert (tmp_path / "cache").stat().st_mode & 0o005


def test_a_model_is_found_in_the_cache_that_the_env_file_names(
    static_model: Path, tmp_path: Path
) -> None:
    """Libraries read HF_HOME when they are imported."""
    snapshot = tmp_path / "hub" / "models--some--model" / "snapshots" / ("0" * 40)
    shutil.copytree(static_model, snapshot)
    (tmp_path / ".env").write_text(f"HF_HOME={tmp_path}\n")
    settings = Settings(embedding_model="some/model", model_cache=tmp_path / "cache")

    finished = listener(
        settings, "model", "convert", check=False, cwd=tmp_path, EMBEDDING_REVISION="0" * 40
    )

    # It was found, or the message would be to fetch it.
    assert "needs no conversion" in finished.stderr


def test_a_conversion_whose_vectors_differ_leaves_nothing(
    one_layer: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proof at its end is no formality."""
    monkeypatch.setattr(engine_openvino, "EXACT", 1.1)

    with pytest.raises(ConfigError, match="differs from that of torch"):
        convert(replace(one_layer, model_cache=tmp_path))

    assert list((tmp_path / "openvino").iterdir()) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"1_Pooling/config.json": {"pooling_mode_cls_token": True}}, "its pooling is cls"),
        ({"1_Pooling/config.json": {"pooling_mode": "max"}}, "its pooling is max"),
        ({"1_Pooling/config.json": {"pooling_mode": None}}, "its pooling is None"),
        ({"1_Pooling/config.json": []}, "its pooling is not readable"),
        ({"1_Pooling/config.json": {"pooling_mode": ["mean", "max"]}}, r"its pooling is mean\+max"),
        ({"modules.json": [{"type": "a.Transformer", "path": ""}]}, "made of Transformer"),
        ({"config_sentence_transformers.json": {"truncate_dim": 256}}, "leaves numbers out"),
        (
            {
                "config_sentence_transformers.json": {
                    "prompts": {"query": "query: "},
                    "default_prompt_name": "query",
                }
            },
            "puts a prompt",
        ),
    ],
)
def test_a_model_of_another_kind_is_refused(
    minilm: Path, tmp_path: Path, change: dict[str, object], says: str
) -> None:
    """One clear line, and auto stays with torch."""
    model = tmp_path / "other"
    shutil.copytree(minilm, model)
    for name, content in change.items():
        (model / name).write_text(json.dumps(content))
    settings = Settings(embedding_model=str(model), model_cache=tmp_path / "cache")

    with pytest.raises(ConfigError, match=says):
        convert(settings)

    assert chosen(settings) == "torch"
    assert not settings.model_cache.exists()


def test_a_static_embedding_is_told_that_it_needs_no_conversion(static_model: Path) -> None:
    """It runs without torch as it is."""
    with pytest.raises(ConfigError, match="needs no conversion"):
        convert(Settings(embedding_model=str(static_model)))


def test_a_cache_that_cannot_be_written_is_a_configuration_error(
    converted: Settings, tmp_path: Path
) -> None:
    """Named with its variable."""
    (tmp_path / "file").touch()

    with pytest.raises(ConfigError, match=r"MODEL_CACHE .* can't be written"):
        convert(replace(converted, model_cache=tmp_path / "file"))


def test_a_full_disk_is_a_configuration_error(one_layer: Settings, tmp_path: Path) -> None:
    """No bug; and no half of a model stays. A limit on the size of a file is as good as full."""
    settings = replace(one_layer, model_cache=tmp_path)
    limited = ["sh", "-c", 'ulimit -f 2048 && exec "$@"', "sh", sys.executable, "-m", "listener"]

    finished = subprocess.run(
        [*limited, "model", "convert"],
        env=environment(settings),
        cwd=empty_folder(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )

    assert finished.returncode == 2
    assert re.match(r"listener: MODEL_CACHE .* can't be written", finished.stderr)
    assert not list(tmp_path.rglob("*.xml"))


# --- files that are not right --------------------------------------------------------------------


@pytest.fixture
def copied(converted: Settings, tmp_path: Path) -> Settings:
    """The converted model in a cache of the test's own, to be damaged."""
    shutil.copytree(converted.model_cache, tmp_path / "cache")
    return replace(converted, model_cache=tmp_path / "cache", engine="openvino")


def test_a_model_that_moves_stays_converted(converted: Settings, tmp_path: Path) -> None:
    """Contents count, not the path."""
    moved = tmp_path / "elsewhere"
    shutil.copytree(converted.embedding_model, moved)

    assert chosen(replace(converted, embedding_model=str(moved))) == "openvino"


def test_the_converted_model_of_another_is_never_used(
    copied: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by its name, nor if its files are put where this one's should be, nor one of before."""
    other = tmp_path / "model"  # the same last part of the path
    shutil.copytree(copied.embedding_model, other)
    (other / "vocab.txt").write_text("other")
    settings = replace(copied, embedding_model=str(other))
    theirs = converted_directory(locate(copied), copied)
    ours = converted_directory(locate(settings), settings)

    with monkeypatch.context() as later:
        later.setattr(engine_openvino, "FORMAT", engine_openvino.FORMAT + 1)
        with pytest.raises(ConfigError, match=r"format 1.*run `listener model convert`"):
            load_embedder(copied)
    with pytest.raises(ConfigError, match="is not converted"):
        load_embedder(settings)
    theirs.rename(ours)
    with pytest.raises(ConfigError, match=r"can't be loaded \(ValueError: it is of"):
        load_embedder(settings)


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _zero_the_middle(file: Path) -> None:
    content = bytearray(file.read_bytes())
    start, end = len(content) * 6 // 10, len(content) * 8 // 10
    content[start:end] = bytes(end - start)
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (engine_openvino.WEIGHTS, _truncate),
        (engine_openvino.WEIGHTS, _zero_the_middle),
        (engine_openvino.WEIGHTS, Path.unlink),
        (engine_openvino.GRAPH, _truncate),
        (engine_openvino.TOKENIZER, _truncate),
        (engine_openvino.MANIFEST, _truncate),
    ],
)
def test_a_damaged_converted_model_is_a_configuration_error(
    copied: Settings, name: str, damage: Callable[[Path], None]
) -> None:
    """The message names the command that puts it right."""
    damage(converted_directory(locate(copied), copied) / name)

    with pytest.raises(ConfigError, match=r"can't be loaded .*run `listener model convert`"):
        load_embedder(copied)


def test_a_damaged_converted_model_is_converted_again(copied: Settings) -> None:
    """Though all its files are there."""
    _zero_the_middle(converted_directory(locate(copied), copied) / engine_openvino.WEIGHTS)

    convert(copied)

    assert load_embedder(copied).encode(["a"]).shape == (1, 384)
