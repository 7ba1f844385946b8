"""What an engine's vectors differ from torch's in float32, and what a search notices of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bench import systems
from bench.devices import read_events
from bench.models import Model
from bench.progress import say
from bench.report import Section, at_least
from bench.systems import OPENVINO, OPENVINO_BF16, TORCH
from bench.texts import random_texts
from listener.config import DIMENSION
from listener.embedder import load_embedder
from listener.passes import plan_passes

_NEIGHBOURS = 10
_PASS_TOKENS = 4096
_TARGETS = {OPENVINO: 0.9999, OPENVINO_BF16: 0.999}

Vectors = NDArray[np.float32]


def run(model: Model, count: int) -> Section:
    """On device events where they are beside this clone, else on `count` random texts."""
    templates = {event["message"]: event["template"] for event in read_events()}
    texts = list(templates) or random_texts(count, seed=7)
    exact = _encode(model, TORCH, texts)
    vectors = {TORCH: exact}
    for engine in systems.all_engines():
        if engine != TORCH:
            vectors[engine] = _encode(model, engine, texts)
    return Section(
        f"Precision, model {model.name}",
        f"{len(texts)} distinct {'messages of real devices' if templates else 'random texts'}. "
        "Cosine: of an engine's vector with that of torch in float32. Neighbours: the share of a "
        f"text's {_NEIGHBOURS} nearest other texts that float32 finds, too. Template: the share of "
        "them that come from the same log template.",
        ("engine", "least cosine", "mean cosine", "neighbours", "template", "target"),
        tuple(_cells(engine, exact, of, [*templates.values()]) for engine, of in vectors.items()),
        tuple(systems.what_is_missing()),
    )


def _encode(model: Model, engine: str, texts: Sequence[str]) -> Vectors:
    say(f"precision: {model.name}, {engine}")
    system = systems.listener(engine)
    systems.prepare(system, model.directory)
    embedder = load_embedder(system.settings(model.directory))
    vectors = np.zeros((len(texts), DIMENSION), np.float32)
    for indices in plan_passes(embedder.lengths(texts), _PASS_TOKENS):
        vectors[indices] = embedder.encode([texts[index] for index in indices])
    return vectors


def _cells(
    engine: str, exact: Vectors, vectors: Vectors, templates: Sequence[str]
) -> tuple[str, ...]:
    cosines = (exact * vectors).sum(axis=1)
    nearest = _nearest(vectors)
    same = [len({*a} & {*b}) for a, b in zip(nearest, _nearest(exact), strict=True)]
    names = np.array(templates)
    least = float(cosines.min())
    return (
        engine,
        f"{least:.6f}",
        f"{cosines.mean():.6f}",
        f"{np.mean(same) / _NEIGHBOURS:.4f}",
        f"{(names[nearest] == names[:, None]).mean():.4f}" if templates else "",
        f"{at_least(least, _TARGETS[engine])} (cosine)" if engine in _TARGETS else "",
    )


def _nearest(vectors: Vectors) -> NDArray[np.int64]:
    similar = vectors @ vectors.T
    np.fill_diagonal(similar, -1)
    return np.argsort(-similar, axis=1, kind="stable")[:, :_NEIGHBOURS]
