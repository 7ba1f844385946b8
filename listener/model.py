"""Where a model's files are, what they are called, and how they get there."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from listener.config import DIMENSION, Settings, expanded
from listener.errors import ConfigError

# Weights as safetensors only; no pickles, no code, no other engines' copies of the weights.
_FILES = ["*.json", "*.txt", "model*.safetensors", "*/config.json", "*/model*.safetensors"]
_NOT_FILES = ["onnx/*", "openvino/*"]
_CONFIG = "config_sentence_transformers.json"


@dataclass(frozen=True)
class Module:
    """One step of a sentence-transformers model: the name of its class, and where its files are."""

    kind: str
    directory: Path


@dataclass(frozen=True)
class ModelFiles:
    """A model on disk; `name` is name@revision, `contents` a digest or the hub's commit."""

    directory: Path
    name: str
    contents: str
    precision: str = "fp32"

    @property
    def fingerprint(self) -> str:
        """What is stored as `model` beside each vector: name, revision and precision."""
        return f"{self.name}/{self.precision}"

    def modules(self) -> list[Module]:
        """What it is put together of, in order; empty if it doesn't say so readably."""
        try:
            listed = json.loads((self.directory / "modules.json").read_text("utf-8"))
            return [
                Module(one["type"].rpartition(".")[2], self.directory / one["path"])
                for one in listed
            ]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return []

    def has_prompt(self) -> bool:
        """Whether sentence-transformers would put words before each text by itself."""
        config = self._config()
        prompts = config.get("prompts")
        return isinstance(prompts, dict) and bool(prompts.get(config.get("default_prompt_name")))

    def shortens(self) -> bool:
        """Whether sentence-transformers would leave numbers out of each vector by itself."""
        return self._config().get("truncate_dim") is not None

    def pickled(self) -> Path | None:
        """Weights that only a pickle holds: it may run code, and `contents` doesn't cover it."""
        safe = ("model.safetensors", "model.safetensors.index.json")
        for found in self.directory.rglob("pytorch_model*.bin"):
            if not any((found.parent / name).exists() for name in safe):
                return found
        return None

    def _config(self) -> dict[str, Any]:
        try:
            config = json.loads((self.directory / _CONFIG).read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return config if isinstance(config, dict) else {}


def locate(settings: Settings) -> ModelFiles:
    """Find the model in a directory or in the local hub cache; never goes to the network.

    Raises ConfigError with the command that fetches it.
    """
    try:
        return _locate(settings)
    except OSError as error:
        raise ConfigError(
            f"EMBEDDING_MODEL {settings.embedding_model} can't be read ({error.strerror}: "
            f"{error.filename}); make its files readable for this account"
        ) from error


def _locate(settings: Settings) -> ModelFiles:
    directory = _named_directory(settings)
    if directory:
        _require_modules(directory)
        digest = _digest(directory)
        name = f"{_short_path(directory)}@{digest[:12]}"
        return ModelFiles(directory, name, digest, settings.precision)
    found = _pinned_snapshot(settings) or _snapshot_of_the_client(settings)
    _require_modules(found)
    # The commit, where the setting names a branch, which may be another model tomorrow.
    name = f"{settings.embedding_model}@{found.name[:12]}"
    return ModelFiles(found, name, found.name, settings.precision)


def _named_directory(settings: Settings) -> Path | None:
    """The directory that the setting names; None where it names a model of the hub."""
    directory = expanded("EMBEDDING_MODEL", settings.embedding_model)
    if directory.is_dir():
        return directory
    if settings.embedding_model.startswith(("/", ".", "~")):
        raise ConfigError(f"EMBEDDING_MODEL {settings.embedding_model} is not a directory")
    return None


def _require_modules(directory: Path) -> None:
    """Without that file the library would make up pooling and length: other vectors, same name."""
    if not (directory / "modules.json").is_file():
        raise ConfigError(
            f"the model in {directory} has no modules.json, so it is no model of "
            "sentence-transformers, or not all of it; run `listener model fetch`, or set "
            "EMBEDDING_MODEL to another"
        )


def fetch(settings: Settings) -> Path:
    """Download the pinned revision to the local hub cache. Raises ConfigError without a hub."""
    if _named_directory(settings):
        raise ConfigError(
            f"EMBEDDING_MODEL {settings.embedding_model} is a directory, which holds all that is "
            "used of the model; to fetch one of the hub, set EMBEDDING_MODEL to its name there"
        )
    try:
        found = _snapshot(settings, offline=False)
    except Exception as error:  # the hub's client, HTTP and a proxy each have errors of their own
        # Of a full disk, say; a message of the client's may carry an address with a token.
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise ConfigError(
            f"{settings.embedding_model} at {settings.embedding_revision[:12]} can't be fetched "
            f"({reason}); check the name, the revision, the way to the hub and the disk"
        ) from error
    _require_modules(found)
    # The client closes it to others, and the service may run under another account.
    with suppress(OSError):
        _listing(found).chmod(0o644)
    return found


def _pinned_snapshot(settings: Settings) -> Path | None:
    """A full commit is a directory of the local cache: found without the hub's client.

    Importing the client takes longer than loading the model.
    """
    from huggingface_hub import constants

    repository = "models--" + settings.embedding_model.replace("/", "--")
    found = Path(constants.HF_HUB_CACHE, repository, "snapshots", settings.embedding_revision)
    try:
        (found / "modules.json").stat()
    except FileNotFoundError:
        return None
    return found if _is_complete(found) else None


def _listing(snapshot: Path) -> Path:
    """Where the client notes which files a commit has."""
    return snapshot.parents[1] / "trees" / f"{snapshot.name}.json"


def _is_complete(snapshot: Path) -> bool:
    """Whether all is there that the client noted at its download; False where it noted nothing."""
    try:
        files = list(json.loads(_listing(snapshot).read_text("utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return all(
        (snapshot / file).is_file()
        for file in files
        if any(fnmatch(file, pattern) for pattern in _FILES)
        and not any(fnmatch(file, pattern) for pattern in _NOT_FILES)
    )


def _snapshot_of_the_client(settings: Settings) -> Path:
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return _snapshot(settings, offline=True)
    except (LocalEntryNotFoundError, HFValidationError):
        raise ConfigError(
            f"EMBEDDING_MODEL {settings.embedding_model} at {settings.embedding_revision[:12]} is "
            "neither a directory nor in the local cache; run `listener model fetch` where a hub "
            "can be reached, or name a directory"
        ) from None


def cannot_be_loaded(files: ModelFiles, error: Exception) -> ConfigError:
    """What to raise when a library can't read the model."""
    cause, _, _ = str(error).strip().partition("\n")
    return ConfigError(
        f"the model in {files.directory} can't be loaded ({type(error).__name__}: {cause}); "
        "fetch it again"
    )


def require_dimension(files: ModelFiles, dimension: int) -> None:
    """Raise ConfigError if the model's vectors don't fit event_embeddings."""
    if dimension != DIMENSION:
        raise ConfigError(
            f"the model in {files.directory} gives {dimension} numbers, event_embeddings holds "
            f"{DIMENSION}; set EMBEDDING_MODEL to a {DIMENSION}-D model"
        )


def _snapshot(settings: Settings, *, offline: bool) -> Path:
    from huggingface_hub import snapshot_download

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
