"""A config that trains heads of a tiny random Llama on a small ShareGPT file."""

import pytest
from tiny_models import build_model

from medusa_exp.config import Config, DatasetConfig, ModelConfig, TrainConfig
from medusa_exp.config import HeadConfig as Head


@pytest.fixture
def config(tmp_path, tokenizer, sharegpt_file) -> Config:
    model = build_model("llama")
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return Config(
        device="cpu",
        cache_dir=str(tmp_path / "cache"),
        model=ModelConfig(path=str(tmp_path / "model")),
        dataset=DatasetConfig(path=str(sharegpt_file), val_fraction=0.2, test_fraction=0.2),
        head=Head(num_heads=2),
        train=TrainConfig(
            max_steps=12, batch_tokens=200, val_every=6, val_batches=2, checkpoint_every=4
        ),
    )
