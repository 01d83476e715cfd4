"""What a model is called: by its two ends, and by a sample of all its weights.

Weights count as bfloat16, so that a model has one name in whatever dtype it is loaded. Rounded to
float16 first, some are others in bfloat16: such a model is called what it is in bfloat16, and is
known by its former names too, under which earlier versions have made heads and caches.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from medusa_exp.identity import bfloat16_bytes, identity_of

_SAMPLE = 4096
"""Values of a parameter that `Names.fingerprint` reads, about."""


class Names:
    """Identity and fingerprint of a model: computed when asked for, or as they were given."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._given: tuple[str, str] | None = None
        self._former: tuple[str, str] | None = None

    def identity(self) -> str:
        """Return a sha256 over dimensions, final norm and lm_head: what heads are trained for."""
        return identity_of(self._model) if self._given is None else self._given[0]

    def fingerprint(self) -> str:
        """Return a sha256 over a sample of every parameter: what the model's responses depend on.

        A sample, since reading all of a large model takes minutes, and training or merging leaves
        no tensor's values as they were.
        """
        if self._given is not None:
            return self._given[1]
        digest = hashlib.sha256(self.identity().encode())
        for name, parameter in sorted(self._model.named_parameters()):
            flat = parameter.detach().flatten()
            sample = bfloat16_bytes(flat[:: max(1, len(flat) // _SAMPLE)])
            digest.update(f"{name} {list(parameter.shape)}".encode() + sample)
        return digest.hexdigest()

    def has_identity(self, identity: str) -> bool:
        """Say whether the model is called so, or was in earlier versions."""
        return identity in (self.identity(), self._former and self._former[0])

    def has_fingerprint(self, fingerprint: str) -> bool:
        """Say whether these are the weights of a fingerprint; as `has_identity`."""
        return fingerprint in (self.fingerprint(), self._former and self._former[1])

    def give(self, identity: str, fingerprint: str) -> None:
        """Name a model of which not all is here."""
        self._given = identity, fingerprint

    def rename(self, identity: str, fingerprint: str) -> None:
        """Call the model what it is in a dtype that rounds its weights less than float16."""
        self._former = self.identity(), self.fingerprint()
        self._given = identity, fingerprint

    def keep(self) -> None:
        """Note the names, before the weights are taken apart."""
        self._given = self.identity(), self.fingerprint()

    def forget(self) -> None:
        """Name the model anew from now on: training has made another of it."""
        self._given = self._former = None

    @property
    def has_former(self) -> bool:
        """Had this model other names in earlier versions?"""
        return self._former is not None and self._former != self._given

    @contextmanager
    def former(self) -> Iterator[None]:
        """Give the model its former names for a while, to find what was made under them."""
        now = self._given
        self._given = self._former or now
        try:
            yield
        finally:
            self._given = now
