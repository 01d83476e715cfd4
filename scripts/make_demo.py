"""Make the model and the heads of `+experiment=demo`, in src/medusa_exp/demo/.

    python scripts/make_demo.py [FOLDER]        FOLDER keeps the runs; by default outputs/make_demo

With OMP_NUM_THREADS=1, seven minutes of one core. The recipe of `from_scratch` for a smaller model:
pretraining on generated chats, responses of its own, heads trained on these, a calibrated tree. The
weights are stored in float16; responses and heads are those of the stored backbone.
"""

import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from medusa_exp import compose, run
from medusa_exp.demo import PLACE, WEIGHTS, digests
from medusa_exp.runs.files import read_json, write_json
from medusa_exp.stages.session import Session

_SHARED = (
    *("+experiment=from_scratch", "logger=none", "dtype=fp32"),
    *("dataset.num_conversations=8000", "tokenizer.vocab_size=512"),
)
_BACKBONE = (
    *("stages=[pretrain]", "model.pretrain.hidden_size=128"),
    *("model.pretrain.intermediate_size=344", "model.pretrain.num_hidden_layers=4"),
    *("model.pretrain.learning_rate=5e-3", "model.pretrain.max_steps=1500"),
)
_HEADS = (
    *("model=pretrained", f"model.path={PLACE / 'backbone'}", "tokenizer=auto"),
    *("stages=[regenerate,train,calibrate,evaluate]", "head.num_heads=7"),
    *("regenerate.num_documents=700", "train.max_steps=700", "tree.batch_sizes=[1]"),
)
_LEFT_OUT = ("tokenizer_source.json", "README.md")
"""Of heads/: what names this machine's places, and what each run writes of itself."""


def main(folder: Path) -> None:
    """Make the demo's files."""
    cache = f"cache_dir={folder / 'cache'}"
    backbone = compose([*_SHARED, *_BACKBONE, cache])
    run(backbone, folder / "backbone")
    _store(Session(backbone, folder / "backbone").tiny, PLACE / "backbone")
    run(compose([*_SHARED, *_HEADS, cache]), folder / "heads")
    _store(folder / "heads" / "heads", PLACE / "heads")
    tree = read_json(folder / "heads" / "tree.json")
    write_json(PLACE / "tree.json", tree)
    write_json(PLACE / "digests.json", digests())


def _store(source: Path, target: Path) -> None:
    """Copy a directory, with its weights in float16."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(*_LEFT_OUT, "pretrain_*"))
    tensors = load_file(target / WEIGHTS)
    halves = {name: tensor.to(torch.float16) for name, tensor in tensors.items()}
    save_file(halves, target / WEIGHTS, metadata={"format": "pt"})
    (target / WEIGHTS).chmod(0o644)
    config = read_json(target / "config.json")
    if "backbone" in config:  # a place on this machine
        write_json(target / "config.json", {**config, "backbone": "medusa_exp.demo"})


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/make_demo").resolve())
