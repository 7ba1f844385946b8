"""Where a model's files are, what they are called, and how they get there."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from listener.config import Settings
from listener.errors import ConfigError

# Weights as safetensors only; no pickles, no code, no other engines' copies of the weights.
_FILES = ["*.json", "*.txt", "model*.safetensors", "*/config.json", "*/model*.safetensors"]
_NOT_FILES = ["onnx/*", "openvino/*"]


@dataclass(frozen=True)
class ModelFiles:
    """A model on disk; `name` is name@revision."""

    directory: Path
    name: str

    @property
    def fingerprint(self) -> str:
        """What is stored as `model` beside each vector: name, revision and precision."""
        return f"{self.name}/fp32"


def locate(settings: Settings) -> ModelFiles:
    """Find the model in a directory or in the local hub cache; never goes to the network.

    Raises ConfigError with the command that fetches it.
    """
    directory = Path(settings.embedding_model).expanduser()
    if directory.is_dir():
        return ModelFiles(directory, f"{_short_path(directory)}@{_digest(directory)[:12]}")
    if settings.embedding_model.startswith(("/", ".", "~")):
        raise ConfigError(f"EMBEDDING_MODEL {settings.embedding_model} is not a directory")
    try:
        found = _snapshot(settings, offline=True)
    except (LocalEntryNotFoundError, HFValidationError):
        raise ConfigError(
            f"EMBEDDING_MODEL {settings.embedding_model} at {settings.embedding_revision[:12]} is "
            "neither a directory nor in the local cache; run `listener model fetch` where a hub "
            "can be reached, or name a directory"
        ) from None
    name = f"{settings.embedding_model}@{settings.embedding_revision[:12]}"
    return ModelFiles(found, name)


def fetch(settings: Settings) -> Path:
    """Download the pinned revision to the local hub cache. Raises ConfigError without a hub."""
    try:
        found = _snapshot(settings, offline=False)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"{settings.embedding_model} at {settings.embedding_revision[:12]} can't be fetched "
            f"({type(error).__name__}); check the name, the revision and the way to the hub"
        ) from error
    return found


def _snapshot(settings: Settings, *, offline: bool) -> Path:
    found = snapshot_download(
        settings.embedding_model,
        revision=settings.embedding_revision,
        allow_patterns=_FILES,
        ignore_patterns=_NOT_FILES,
        local_files_only=offline,
    )
    return Path(found)


def _short_path(directory: Path) -> str:
    return "/".join(directory.resolve().parts[-2:])


def _digest(directory: Path) -> str:
    """sha256 over the files that decide what a text's vector is."""
    total = hashlib.sha256()
    files = [
        path
        for pattern in ("*.json", "*.txt", "*.safetensors")
        for path in directory.rglob(pattern)
        if path.is_file()
    ]
    for path in sorted(files):
        total.update(str(path.relative_to(directory)).encode())
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()
