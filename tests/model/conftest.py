"""Models' directories with tokenizers of a few hundred entries in them."""

from pathlib import Path

import pytest
from tiny_tokenizers import llama_tokenizer, write
from tokenizers import normalizers


@pytest.fixture
def place(tmp_path, tokenizer) -> Path:
    return write(tmp_path / "model", tokenizer)


@pytest.fixture
def roomy(tmp_path, tokenizer) -> Path:
    """A model with more rows than its tokenizer needs."""
    return write(tmp_path / "model", tokenizer, rows=len(tokenizer) + 4)


@pytest.fixture
def lowercasing(tmp_path) -> Path:
    """A tokenizer.json whose normalizer the class that its directory names leaves out."""
    tokenizer = llama_tokenizer()
    place = write(tmp_path / "model", tokenizer)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.backend_tokenizer.save(str(place / "tokenizer.json"))
    return place
