"""The engine of the default install: sentence-transformers. Importing this imports torch."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import batch_to_device
from transformers.utils import logging as transformers_logging

from listener import passes
from listener.counters import counters
from listener.errors import ConfigError, EncoderLost
from listener.helper_threads import HelperThreads, is_short_alone
from listener.model import ModelFiles, cannot_be_loaded, require_dimension

_NO_LIMIT = 10**9
# Long enough that helpers have something to do.
_USUAL = "pump 7 is running hot, the temperature of its bearing is over the limit of 80 degrees"


class SentenceTransformersEmbedder:
    """sentence-transformers on torch: float32, no remote code, safetensors, offline.

    `model` is the library's own.
    """

    def __init__(self, files: ModelFiles) -> None:
        """Load the model, onto a GPU where torch finds one.

        Raises ConfigError if it is damaged or gives no 384 numbers, EncoderLost if the GPU fails.
        """
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        self._threads = torch.get_num_threads()
        on_gpu = torch.cuda.is_available()
        self.engine = f"torch on {torch.cuda.get_device_name()}" if on_gpu else "torch"
        self.overhead_tokens = passes.OVERHEAD_ON_GPU if on_gpu else passes.OVERHEAD_ON_CPU
        if pickled := files.pickled():
            raise ConfigError(
                f"{pickled} is a pickle, which may run code and is not read; save the model with "
                "its weights as safetensors"
            )
        try:
            self.model = SentenceTransformer(
                str(files.directory),
                device="cuda" if on_gpu else "cpu",
                local_files_only=True,
                trust_remote_code=False,
                # The published gte-small is fp16, which a CPU computes up to 100 times slower.
                model_kwargs={"use_safetensors": True, "dtype": torch.float32},
            )
            # The static ones heed no dtype.
            self.model.float().eval()
            # Takes memory of the GPU too, and may be the first that it computes.
            dimension = self._compute(["a"]).shape[1]
            # With the model on a GPU there are no threads to place.
            self._helpers = None if on_gpu else HelperThreads(lambda: self._compute([_USUAL]))
        except (torch.AcceleratorError, torch.OutOfMemoryError) as error:
            raise _gpu_failed(error) from error
        except MemoryError:
            # No ConfigError, on which systemd stays down: after a restart there may be memory.
            raise
        except Exception as error:
            # What a damaged or unknown file makes the libraries raise is any class there is.
            raise cannot_be_loaded(files, error) from error
        _require_float32(self.model, files)
        self.fingerprint = files.fingerprint
        self.max_tokens: int | None = _max_tokens(self.model)
        # The model's own is set to pad and cut while it encodes.
        self._tokenizer = copy.deepcopy(self.model.tokenizer)
        require_dimension(files, dimension)

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Shape (len(texts), 384), rows of unit length, in the order of the texts."""
        if self._helpers:
            # On a core that is busy with something else a helper would hold up a text for half a
            # second.
            alone = is_short_alone(texts) and not self._helpers.have_idle_cores()
            torch.set_num_threads(1 if alone else self._threads)
            if not alone:
                self._helpers.place_for(texts)
        try:
            numbers = self._compute(texts)
        except torch.AcceleratorError as error:
            raise _gpu_failed(error) from error
        counters.texts_truncated += sum(map(self._is_cut, texts))
        return numbers

    def _compute(self, texts: Sequence[str]) -> NDArray[np.float32]:
        # As the library's `encode`, without what that does around it: a text alone waits for it.
        prompt = self.model.prompts.get(self.model.default_prompt_name or "")
        features = self.model.preprocess(list(texts), prompt=prompt)
        with torch.inference_mode():
            found = self.model(batch_to_device(features, self.model.device))["sentence_embedding"]
            vectors = torch.nn.functional.normalize(found[:, : self.model.truncate_dim], dim=1)
        numbers: NDArray[np.float32] = vectors.cpu().numpy()
        return numbers

    def _is_cut(self, text: str) -> bool:
        # A token takes a byte at least, so only a long text is worth counting; two are special.
        if self.max_tokens is None or len(text.encode()) + 2 <= self.max_tokens:
            return False
        return self.count_tokens(text) > self.max_tokens

    def transformer(self) -> Any:
        """The bare transformer, without pooling."""
        return self.model[0].auto_model

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """The tokens of each text that the model computes."""
        return [min(count, self.max_tokens or count) for count in self._count(texts)]

    def count_tokens(self, text: str) -> int:
        """How many tokens the whole text has, special ones included."""
        return self._count([text])[0]

    def _count(self, texts: Sequence[str]) -> list[int]:
        tokenizer: Any = self._tokenizer
        if hasattr(tokenizer, "encode_batch"):  # a static embedding's bare tokenizer
            return [len(encoding.ids) for encoding in tokenizer.encode_batch(list(texts))]
        ids = tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]
        return [len(one) for one in ids]


def _require_float32(model: SentenceTransformer, files: ModelFiles) -> None:
    types = {parameter.dtype for parameter in model.parameters()}
    if types - {torch.float32}:
        raise ConfigError(f"the model in {files.directory} has weights of {types}, not float32")


def _gpu_failed(error: RuntimeError) -> EncoderLost:
    # After the first failure of a kernel, no other runs in this process.
    cause, _, _ = str(error).partition("\n")
    return EncoderLost(
        f"the GPU failed ({cause}); the process ends, to be started again; "
        "to compute on the CPU, set CUDA_VISIBLE_DEVICES=-1"
    )


def _max_tokens(model: SentenceTransformer) -> int | None:
    length = model.max_seq_length
    # Without a limit transformers says infinity, or a number far beyond any text.
    return int(length) if length is not None and length < _NO_LIMIT else None
