"""Loading models: offline, safetensors, float32, 384 numbers; and what is said when it fails."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tracemalloc
import weakref
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file

from listener import model
from listener.config import GTE_SMALL, GTE_SMALL_REVISION, Settings
from listener.embedder import load_embedder
from listener.encoding import Encoder
from listener.engine_torch import SentenceTransformersEmbedder
from listener.errors import ConfigError, EmbeddingError, EncoderLost, ModelFault
from listener.model import fetch, locate
from tests.harness import TinyEmbedder, listener, vector_of


def test_gte_small_is_found_in_the_local_cache_and_computed_in_float32(
    gte_small_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The published files are fp16; a CPU would take up to 100 times as long with them."""
    from safetensors import safe_open

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(gte_small_cache))
    files = locate(Settings())
    with safe_open(files.directory / "model.safetensors", "np") as weights:
        assert weights.get_tensor(next(iter(weights.keys()))).dtype == np.float16

    embedder = SentenceTransformersEmbedder(files)

    vectors = embedder.encode(["pump running hot", "a"])
    assert embedder.fingerprint == f"thenlper/gte-small@{GTE_SMALL_REVISION[:12]}/fp32"
    assert embedder.max_tokens == 512
    assert vectors.shape == (2, 384)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("prompt", ["", "passage: "])
def test_torch_gives_the_vectors_of_the_library(minilm: Path, tmp_path: Path, prompt: str) -> None:
    """Of its `encode`, and with the words that a model may want before each text."""
    from sentence_transformers import SentenceTransformer

    directory = tmp_path / "model"
    shutil.copytree(minilm, directory)
    config = directory / "config_sentence_transformers.json"
    prompts = {"prompts": {"document": prompt}, "default_prompt_name": "document"}
    config.write_text(json.dumps(json.loads(config.read_text()) | prompts))
    texts = ["pump running hot", "", "door left open " * 300, "🚰"]
    library = SentenceTransformer(str(directory), device="cpu")

    vectors = SentenceTransformersEmbedder(locate(Settings(embedding_model=str(directory)))).encode(
        texts
    )

    np.testing.assert_allclose(vectors, library.encode(texts, normalize_embeddings=True), atol=1e-6)
    plain = library.encode(texts, prompt="", normalize_embeddings=True)
    assert np.allclose(vectors, plain, atol=1e-6) is not bool(prompt)


def test_an_error_of_the_gpu_is_no_texts_fault(
    minilm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not halved, not tried again in this process; `test_gpu.py` has it from a real one."""
    settings = Settings(embedding_model=str(minilm), engine="torch")
    encoder = Encoder(lambda: load_embedder(settings), cache_texts=0)

    def forward(*_: object, **__: object) -> None:
        raise torch.AcceleratorError("CUDA error: unspecified launch failure\nmore")

    monkeypatch.setattr("sentence_transformers.SentenceTransformer.forward", forward)

    with (
        closing(encoder),
        pytest.raises(EncoderLost, match=r"\(CUDA error: unspecified launch"),
    ):
        encoder.encode(["pump running hot", "door left open"])
    with pytest.raises(EncoderLost, match="CUDA_VISIBLE_DEVICES=-1"):
        load_embedder(settings)


def test_a_gpu_that_has_no_memory_left_does_not_keep_the_service_down(
    monkeypatch: pytest.MonkeyPatch, static_model: Path
) -> None:
    """Another process may have taken it, for a while."""

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(SentenceTransformersEmbedder, "_compute", full)

    with pytest.raises(EncoderLost, match="the GPU failed"):
        load_embedder(Settings(embedding_model=str(static_model), engine="torch"))


def test_real_weights_put_like_meanings_together(minilm: Path) -> None:
    """A vector is worth having only if it says something."""
    embedder = load_embedder(Settings(embedding_model=str(minilm)))

    hot, warm, door = embedder.encode(
        ["pump running hot", "bearing temperature of the pump above its limit", "door left open"]
    )

    assert hot @ warm > 2 * abs(hot @ door)


def test_batches_of_any_mix_give_the_vectors_of_single_texts(minilm: Path) -> None:
    """Padding and order change nothing."""
    embedder = load_embedder(Settings(embedding_model=str(minilm)))
    texts = ["short", "a much longer text " * 20, "", "🚰🔥" * 50, "medium long text here"]
    encoder = Encoder(lambda: embedder, cache_texts=0)

    together = encoder.encode(texts).results
    alone = [embedder.encode([text])[0] for text in texts]

    np.testing.assert_allclose(np.stack(together), np.stack(alone), atol=1e-5)  # type: ignore[arg-type]
    encoder.close()


def test_a_static_embedding_without_a_transformer_works(static_model: Path) -> None:
    """Any 384-D sentence-transformers directory will do."""
    embedder = load_embedder(Settings(embedding_model=str(static_model)))

    assert embedder.encode(["pump running hot"]).shape == (1, 384)
    assert embedder.count_tokens("pump running hot") >= 3


def test_the_fingerprint_of_a_directory_follows_its_contents(
    static_model: Path, tmp_path: Path
) -> None:
    """Other weights under the same path are another model."""
    copy = tmp_path / static_model.parent.name / "static"
    shutil.copytree(static_model, copy)
    before = locate(Settings(embedding_model=str(copy))).fingerprint
    (copy / "config_sentence_transformers.json").write_text("{}")

    after = locate(Settings(embedding_model=str(copy))).fingerprint

    assert before == locate(Settings(embedding_model=str(static_model))).fingerprint
    assert before != after


def test_the_fingerprint_names_the_commit_where_a_branch_is_set(
    gte_small_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A branch that moves on is another model."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(gte_small_cache))

    branch = locate(Settings(embedding_revision="main"))

    assert branch == locate(Settings())
    assert branch.name == f"{GTE_SMALL}@{GTE_SMALL_REVISION[:12]}"


@pytest.mark.parametrize("name", [GTE_SMALL, "no/name/of a hub"])
def test_a_missing_model_names_the_command_that_fetches_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Exit 2 and a remedy."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))

    with pytest.raises(ConfigError, match="listener model fetch"):
        locate(Settings(embedding_model=name))


def test_a_cache_that_this_account_may_not_read_is_not_taken_for_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To fetch the model again would not help."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    stat = Path.stat

    def closed(path: Path, **how: bool) -> os.stat_result:
        if path.name == "modules.json":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return stat(path, **how)

    monkeypatch.setattr(Path, "stat", closed)

    with pytest.raises(ConfigError, match=r"can't be read \(Permission denied"):
        locate(Settings())


def test_a_model_that_does_not_say_what_it_is_made_of_is_refused(
    minilm: Path, tmp_path: Path
) -> None:
    """The library would make up pooling and length: other vectors under the same name."""
    shutil.copytree(minilm, tmp_path / "bare")
    (tmp_path / "bare" / "modules.json").unlink()

    with pytest.raises(ConfigError, match=r"no modules\.json"):
        locate(Settings(embedding_model=str(tmp_path / "bare")))


@pytest.mark.parametrize("missing", ["modules.json", "sentence_bert_config.json"])
def test_a_half_fetched_model_is_not_taken_for_whole(
    minilm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    """Without one of its small files it would load, and give other vectors."""
    repository = tmp_path / "models--some--model"
    snapshot = repository / "snapshots" / ("0" * 40)
    shutil.copytree(minilm, snapshot)
    (repository / "trees").mkdir()
    entry = {"size": 1, "blob_id": "0" * 40}
    files = {str(p.relative_to(snapshot)): entry for p in snapshot.rglob("*") if p.is_file()}
    files["onnx/config.json"] = entry
    listing = json.dumps({"format_version": 1, "files": files})
    (repository / "trees" / f"{snapshot.name}.json").write_text(listing)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    settings = Settings(embedding_model="some/model", embedding_revision=snapshot.name)
    # Without the client, whose import takes seconds.
    assert model._pinned_snapshot(settings) == snapshot

    (snapshot / missing).unlink()

    with pytest.raises(ConfigError, match="listener model fetch"):
        locate(settings)


@pytest.mark.parametrize(
    "damage", ["truncated", "no config", "no weights", "no pooling", "an adapter", "unknown key"]
)
def test_a_damaged_model_is_a_configuration_error(
    minilm: Path, tmp_path: Path, damage: str
) -> None:
    """One clear line, no traceback of a library."""
    broken = tmp_path / "broken"
    shutil.copytree(minilm, broken)
    weights = broken / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "no weights":
        weights.unlink()
    elif damage == "no pooling":
        shutil.rmtree(broken / "1_Pooling")
    elif damage == "an adapter":
        (broken / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    elif damage == "unknown key":
        pooling = broken / "1_Pooling" / "config.json"
        pooling.write_text(json.dumps({**json.loads(pooling.read_text()), "of_tomorrow": 1}))
    else:
        (broken / "config.json").unlink()

    with pytest.raises(ConfigError, match="can't be loaded"):
        load_embedder(Settings(embedding_model=str(broken)))


def test_a_model_that_this_account_may_not_read_is_one_clear_line(
    static_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one below a home to which the unit has no way."""

    def closed(path: Path) -> bool:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "is_dir", closed)

    with pytest.raises(ConfigError, match=r"can't be read \(Permission denied: /.*static"):
        locate(Settings(embedding_model=str(static_model)))


def static_of(
    folder: Path, minilm: Path, dimension: int, kind: type = np.float32, **how: Any
) -> NDArray[np.float32]:
    """Save a static embedding. Returns the vector of "pump" by the library."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(minilm / "tokenizer.json"))
    numbers = np.random.default_rng(2).standard_normal((tokenizer.get_vocab_size(), dimension))
    module = StaticEmbedding(tokenizer, embedding_weights=numbers.astype(np.float32))
    safe = how.pop("safe_serialization", True)
    model = SentenceTransformer(modules=[module], device="cpu", **how)
    model.save(str(folder), safe_serialization=safe)
    if kind is not np.float32:
        module.embedding.weight.data = module.embedding.weight.data.half()
        save_file(
            {"embedding.weight": module.embedding.weight.data.numpy()},
            folder / "model.safetensors",
        )
    vector: NDArray[np.float32] = model.encode("pump", normalize_embeddings=True)
    return vector


def test_pickled_weights_are_refused_wherever_they_are(tmp_path: Path, minilm: Path) -> None:
    """They may run code, and the fingerprint doesn't cover them."""
    static_of(tmp_path / "pickled", minilm, 384, safe_serialization=False)

    with pytest.raises(ConfigError, match=r"pytorch_model\.bin is a pickle"):
        load_embedder(Settings(embedding_model=str(tmp_path / "pickled")))


@pytest.mark.parametrize("safe", ["model.safetensors", "model.safetensors.index.json"])
def test_a_pickle_beside_safe_weights_is_no_reason_to_refuse_a_model(
    tmp_path: Path, safe: str
) -> None:
    """Whole or in shards: it is not read."""
    pickle = tmp_path / "1_Dense" / "pytorch_model-00001-of-00002.bin"
    pickle.parent.mkdir()
    for file in (tmp_path / "modules.json", pickle):
        file.touch()
    files = locate(Settings(embedding_model=str(tmp_path)))
    assert files.pickled() == pickle

    (pickle.parent / safe).touch()

    assert files.pickled() is None


@pytest.mark.parametrize("where", ["modules.json", "config.json"])
def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path, minilm: Path, where: str) -> None:
    """Whatever file names it; a model of a hub is what a stranger has put there."""
    folder, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(minilm, folder)
    (folder / "theirs.py").write_text(
        f"open({str(ran)!r}, 'w').close()\n"
        "from transformers import BertConfig as Config, BertModel as Model\n"
        "from sentence_transformers.models import Transformer as Module\n"
    )
    found = json.loads((folder / where).read_text())
    if where == "modules.json":
        found[0]["type"] = "theirs.Module"
    else:
        found["auto_map"] = {"AutoConfig": "theirs.Config", "AutoModel": "theirs.Model"}
    (folder / where).write_text(json.dumps(found))

    with suppress(ConfigError):
        load_embedder(Settings(embedding_model=str(folder), engine="torch"))

    assert not ran.exists()


def test_a_model_that_leaves_numbers_out_of_its_vectors_is_heeded(
    tmp_path: Path, minilm: Path
) -> None:
    """As one of the Matryoshka kind."""
    expected = static_of(tmp_path / "long", minilm, 768, truncate_dim=384)

    embedder = load_embedder(Settings(embedding_model=str(tmp_path / "long")))

    assert expected.shape == (384,)
    assert float(embedder.encode(["pump"])[0] @ expected) > 0.99999


@pytest.mark.parametrize("engine", ["auto", "torch"])
def test_a_static_embedding_of_16_bits_is_computed_in_32(
    tmp_path: Path, minilm: Path, engine: str
) -> None:
    """By whichever engine."""
    expected = static_of(tmp_path / "half", minilm, 384, np.float16)

    embedder = load_embedder(Settings(embedding_model=str(tmp_path / "half"), engine=engine))

    found = embedder.encode(["pump"])
    assert found.dtype == np.float32
    assert float(found[0] @ expected.astype(np.float32)) > 0.999


class ProxyError(Exception):
    """None of the hub's errors."""


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ProxyError("407 Proxy Authentication Required"), "ProxyError"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left on device"),
    ],
)
def test_a_fetch_that_fails_is_a_configuration_error_whatever_it_raises(
    monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    """With what the system says, but no message of the client, which may carry a token."""

    def refused(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", refused)

    with pytest.raises(ConfigError, match=rf"can't be fetched \({reason}\)"):
        fetch(Settings())


def test_what_is_fetched_is_open_to_the_account_of_the_service(
    minilm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client closes its list of the files, without which importing it takes seconds."""
    snapshot = tmp_path / "snapshots" / ("0" * 40)
    shutil.copytree(minilm, snapshot)
    listing = tmp_path / "trees" / f"{snapshot.name}.json"
    listing.parent.mkdir()
    listing.touch(0o600)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(snapshot))

    fetch(Settings())

    assert listing.stat().st_mode & 0o777 == 0o644
    (snapshot / "modules.json").unlink()
    with pytest.raises(ConfigError, match=r"no modules\.json"):
        fetch(Settings())


def test_a_directory_is_not_fetched(tmp_path: Path) -> None:
    """The client would take its path for a malformed name of the hub."""
    with pytest.raises(ConfigError, match="is a directory, which holds all"):
        fetch(Settings(embedding_model=str(tmp_path)))


def test_a_model_of_another_size_is_refused(tmp_path: Path, minilm: Path) -> None:
    """event_embeddings holds 384 numbers."""
    static_of(tmp_path / "small", minilm, 256)

    with pytest.raises(ConfigError, match="gives 256 numbers"):
        load_embedder(Settings(embedding_model=str(tmp_path / "small")))


def test_commands_that_do_not_encode_do_not_import_torch() -> None:
    """It costs seconds."""
    import subprocess
    import sys

    code = "import sys, listener.cli; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_missing_model_ends_the_service_with_exit_2(tmp_path: Path) -> None:
    """Before a connection is made, so nothing is half done."""
    settings = Settings(reports_dir=tmp_path)

    finished = listener(settings, "run", check=False, HF_HOME=str(tmp_path))

    assert finished.returncode == 2
    assert "listener model fetch" in finished.stderr
    assert len(finished.stderr.splitlines()) == 1


def test_a_bad_text_fails_alone_in_its_batch() -> None:
    """The batch is halved until the text that raises stands alone."""
    texts = [f"text {number}" for number in range(40)]
    texts[13] = "raise"
    encoder = Encoder(TinyEmbedder, cache_texts=100)

    results = encoder.encode(texts).results

    assert [isinstance(result, EmbeddingError) for result in results] == [
        text == "raise" for text in texts
    ]
    encoder.close()


def test_a_model_that_breaks_in_mid_batch_fails_no_text() -> None:
    """That some were encoded before says nothing of those after."""

    class Breaking(TinyEmbedder):
        def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
            self.is_broken = len(texts) > 1 or bool(self.encoded)
            return super().encode(texts)

    with closing(Encoder(Breaking, 0)) as encoder, pytest.raises(ModelFault, match="a known text"):
        encoder.encode(["a", "b"])


@pytest.mark.parametrize("length", [0.98, 1.02, 0.5])
def test_a_vector_of_another_length_than_1_is_not_stored(length: float) -> None:
    """By inner product it would be nearer or farther than it is."""

    class Stretched(TinyEmbedder):
        def _vector(self, text: str) -> NDArray[np.float32]:
            return super()._vector(text) * np.float32(length if text == "bad" else 1)

    with closing(Encoder(Stretched, 0)) as encoder:
        bad, good = encoder.encode(["bad", "good"]).results

    assert isinstance(bad, EmbeddingError)
    assert f"length {length:.4f} instead of 1" in str(bad)
    assert not isinstance(good, EmbeddingError)


def test_what_a_failed_pass_took_is_free_before_its_halves_run() -> None:
    """Else a pass that lacked memory would leave none for them, and good texts would be parked."""

    class Taken:
        """What a pass takes of the memory."""

    class Large(TinyEmbedder):
        def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
            are_free.append(not any(reference() for reference in taken))
            mine = Taken()
            taken.append(weakref.ref(mine))
            return super().encode(texts)

    taken, are_free = list[weakref.ref[Taken]](), list[bool]()
    encoder = Encoder(Large, cache_texts=0)

    results = encoder.encode(["a", "raise", "b", "c"]).results

    assert [isinstance(result, EmbeddingError) for result in results] == [False, True, False, False]
    assert len(are_free) > 3
    assert all(are_free)
    encoder.close()


def test_a_text_without_any_space_is_cut_too() -> None:
    """A tokenizer would take gigabytes for megabytes of it."""
    asked = list[int]()

    class Measuring(TinyEmbedder):
        def lengths(self, texts: Sequence[str]) -> list[int]:
            asked.extend(map(len, texts))
            return super().lengths(texts)

    encoder = Encoder(Measuring, cache_texts=0)
    text = '{"reading":71,"unit":"C"},' * 50_000

    passes = encoder.plan([text, text + "a", "b"], 1000)
    encoder.encode([text])

    assert sum(len(one.indices) for one in passes) == 3
    assert max(asked) < 150_000
    encoder.close()


def test_what_was_planned_as_known_is_not_forgotten_before_it_is_encoded() -> None:
    """Many such texts would go through the model with the first pass, however large."""
    embedder = TinyEmbedder()
    encoder = Encoder(lambda: embedder, cache_texts=2)
    encoder.encode(["a", "b"])

    encoder.plan(["a", "c"], 1000)
    encoder.encode(["d"])

    assert encoder.encode(["a"]).reused == 1
    encoder.close()


def test_the_memory_of_vectors_is_bounded() -> None:
    """The least recently used text goes first."""
    embedder = TinyEmbedder()
    encoder = Encoder(lambda: embedder, cache_texts=2)
    for text in ("a", "b", "a", "c", "a", "b"):
        encoder.encode([text])

    assert embedder.encoded == ["a", "b", "c", "b"]
    encoder.close()


def test_a_remembered_vector_keeps_neither_its_text_nor_its_batch_mates() -> None:
    """Whatever stays in memory has the size that the documentation gives it."""

    class Forgetful(TinyEmbedder):
        def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
            return np.stack([vector_of(text) for text in texts])

    def long_text(number: int) -> str:
        return f"{number} " * 5_000

    encoder = Encoder(Forgetful, cache_texts=100)
    encoder.encode(["warm"])
    tracemalloc.start()
    for batch in range(60):
        again = [long_text(number) for number in range(batch + 1)]
        encoder.encode([*again, *(f"once {batch} {number}" for number in range(40))])
    del again
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert encoder.encode([long_text(0)]).reused == 1
    assert kept < 100 * 2_500
    encoder.close()


@pytest.mark.parametrize(
    "text", ["pump " * 200_000, "🚰" * 5_000, "word " * 600, "\t\n ", "\u200b\u0301\ufffd"]
)
def test_a_text_of_any_size_and_script_gets_a_unit_vector(minilm: Path, text: str) -> None:
    """A megabyte, all emoji, more than 512 tokens, nothing to see; alone and with a mate."""
    encoder = Encoder(lambda: load_embedder(Settings(embedding_model=str(minilm))), cache_texts=0)

    (alone,) = encoder.encode([text]).results
    together, _ = encoder.encode([text, "mate"]).results

    assert not isinstance(alone, EmbeddingError)
    assert not isinstance(together, EmbeddingError)
    np.testing.assert_allclose(alone, together, atol=1e-5)
    encoder.close()


def test_vectors_of_another_size_are_the_models_fault_not_the_events() -> None:
    """Nothing would be parked for it."""

    class Narrow(TinyEmbedder):
        def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
            return super().encode(texts)[:, :100]

    encoder = Encoder(Narrow, cache_texts=0)

    with pytest.raises(ModelFault, match="100"):
        encoder.encode(["a", "b"])
    encoder.close()


def test_long_texts_that_begin_alike_have_vectors_of_their_own() -> None:
    """What stands for a long text in memory stands for all of it."""
    beginning = "word " * 200
    with closing(Encoder(TinyEmbedder, 10)) as encoder:
        first, second = (encoder.encode_one(beginning + end) for end in ("one", "two"))

    assert not np.array_equal(first, second)


def test_the_fingerprint_of_a_directory_follows_its_vocabulary(
    static_model: Path, tmp_path: Path
) -> None:
    """Another order, or another file of the same contents, gives other vectors."""
    directory = tmp_path / "model"
    shutil.copytree(static_model, directory)
    settings = Settings(embedding_model=str(directory))
    fingerprints = []
    for text in ("a\nb\n", "b\na\n"):
        (directory / "vocab.txt").write_text(text)
        fingerprints.append(locate(settings).fingerprint)
    (directory / "vocab.txt").rename(directory / "words.txt")
    fingerprints.append(locate(settings).fingerprint)

    assert len(set(fingerprints)) == 3
