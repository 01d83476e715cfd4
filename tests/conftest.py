"""What several tests need: a tiny random backbone, a tokenizer, chats, a config, the kernels."""

import json
import os
from pathlib import Path

import pytest
from chat_files import conversation_record
from hypothesis import settings
from kernel_shim import GXX, ShimKernels
from served_models import byte_tokenizer
from tiny_models import build_model
from transformers import PreTrainedTokenizerFast

from medusa_exp.config import Config, DatasetConfig, DecodeConfig, ModelConfig, TrainConfig
from medusa_exp.config import HeadConfig as Head
from medusa_exp.model import Backbone

# A shared machine says nothing about how long an example takes. `nox -s masks` asks for thorough.
settings.register_profile("quick", max_examples=40, deadline=None)
settings.register_profile("thorough", max_examples=2000, deadline=None)
settings.load_profile("quick")

DEVICE = os.environ.get("MEDUSA_EXP_TEST_DEVICE", "cpu")
"""Where the config's models run: "cuda" tries the product on a GPU, a real or an emulated one."""


@pytest.fixture
def backbone() -> Backbone:
    return Backbone(build_model("llama"))


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture
def sharegpt_file(tmp_path: Path) -> Path:
    path = tmp_path / "chat.json"
    path.write_text(json.dumps([conversation_record(i) for i in range(40)]))
    return path


@pytest.fixture
def config(tmp_path, tokenizer, sharegpt_file) -> Config:
    """Return a config that trains heads of a tiny random Llama on a small ShareGPT file."""
    model = build_model("llama")
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return Config(
        device=DEVICE,
        # The kernels have tests of their own, and an emulated GPU takes long for them.
        decode=DecodeConfig(verifier="auto" if DEVICE == "cpu" else "torch"),
        cache_dir=str(tmp_path / "cache"),
        model=ModelConfig(path=str(tmp_path / "model")),
        dataset=DatasetConfig(path=str(sharegpt_file), val_fraction=0.2, test_fraction=0.2),
        head=Head(num_heads=2),
        train=TrainConfig(
            max_steps=12, batch_tokens=200, val_every=6, val_batches=2, checkpoint_every=4
        ),
    )


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> ShimKernels:
    if GXX is None:
        pytest.skip("there is no g++: the kernels cannot be run on the CPU")
    flags = tuple(os.environ.get("KERNEL_TEST_FLAGS", "").split())
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # what one compiles, the others find
        folder = folder.parent
    (folder / "shim").mkdir(exist_ok=True)
    return ShimKernels(folder / "shim", flags=flags)
