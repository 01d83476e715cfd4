"""How fast heads train, what hidden states on disk save, and how much memory the loss takes.

    python benchmarks/train.py [--only online,cache,memory,overhead,teacher] [--out FILE]

Models are random Llamas and documents are random tokens of ShareGPT's lengths: only shapes matter
here. Seconds are the processor's. It takes some minutes on two cores, and up to 14 GB for the plain
form of the loss. Set OMP_NUM_THREADS=1 on a machine that others use.
"""

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from measuring import Row, best_seconds, machine, show, write
from rivals.plain_training import MEMORY_MARK, plain_epoch
from transformers import LlamaConfig, LlamaForCausalLM

from medusa_exp.config import Config
from medusa_exp.config import HeadConfig as Head
from medusa_exp.data.datamodule import Batch
from medusa_exp.data.examples import Examples, Table
from medusa_exp.data.feature_cache import Features
from medusa_exp.model import Backbone, build_heads, loss
from medusa_exp.model.loss import Objective, medusa_loss, medusa_losses
from medusa_exp.stages.train import build_module
from medusa_exp.stages.training_inputs import Inputs
from medusa_exp.train.precompute import FeatureSettings, open_features
from medusa_exp.train.trainer import build_trainer

_REPEATS = 3
_CLOCK = time.process_time
"""Of the processor, all threads': beside other processes a clock on the wall says nothing."""
_MAX_LENGTH = 512


@dataclass
class Case:
    """A model, documents, and how heads are trained on them."""

    config: Config
    inputs: Inputs
    work: Path

    @property
    def num_tokens(self) -> int:
        """Of all documents, without padding."""
        return int(self.inputs.documents["train"].lengths.sum())

    def train(self, config: Config | None = None) -> None:
        """Train for one pass over the documents."""
        config = config or self.config
        heads = build_heads(self.inputs.backbone, num_heads=config.head.num_heads)
        batches = self.inputs.batches(config)
        steps = batches.batches_per_epoch()
        module = build_module(config, self.inputs, heads, steps)
        out = self.work / "run"
        device = torch.device(config.device)
        trainer = build_trainer(device, out, "train", max_steps=steps, precision="bf16-mixed")
        out.mkdir(exist_ok=True)
        trainer.fit(module, batches)


def build_case(work: Path, *, layers: int, width: int, vocabulary: int, documents: int) -> Case:
    """Make a random backbone and random documents for it."""
    torch.manual_seed(0)
    config = Config(device="cpu", cache_dir=str(work / "cache"), head=Head(num_heads=4))
    config.train.batch_tokens, config.train.max_steps = 2048, None
    shape = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=int(width * 2.6875),
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 128),
        max_position_embeddings=_MAX_LENGTH,
    )
    backbone = Backbone(LlamaForCausalLM(shape).eval().requires_grad_(False))
    made = {"train": random_documents(documents, vocabulary)}
    inputs = Inputs(backbone, None, made, "made up", _MAX_LENGTH, {}, [], [])  # type: ignore
    return Case(config, inputs, work)


def random_documents(number: int, vocabulary: int) -> Examples:
    """Make documents of log-normal lengths, cut to the limit; the last 60 % is trained."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5.0, 0.8, number).astype(int), 16, _MAX_LENGTH)
    rows = (
        (rng.integers(0, vocabulary, n), np.arange(n) > 0.4 * n, str(i), "made up")
        for i, n in enumerate(lengths)
    )
    return Examples(Table.of(rows))


def online_rows(work: Path) -> list[Row]:
    """Ours against a loop that pads to the limit and projects all heads at every position."""
    case = build_case(work, layers=6, width=256, vocabulary=2048, documents=160)
    at_once = replace_form(case.config, "at_once")
    sides: list[Callable[[], object]] = [
        case.train,
        lambda: case.train(at_once),
        lambda: plain_epoch(case.inputs, num_heads=4, rows=4, length=_MAX_LENGTH),
    ]
    for side in sides:
        side()
    ours, other_form, plain = best_seconds(_REPEATS, *sides, clock=_CLOCK)
    rates = [case.num_tokens / seconds for seconds in (ours, other_form, plain)]
    details = {"loss_form=at_once, tokens/s": rates[1], "documents' tokens": case.num_tokens}
    row = Row(
        what="trained tokens, online",
        unit="tokens/s",
        ours=rates[0],
        bar=">= 4x",
        is_cleared=rates[0] >= 4 * rates[2],
        reference=rates[2],
        ratio=rates[0] / rates[2],
        details=details,
    )
    return [row]


def cache_rows(work: Path) -> list[Row]:
    """A second training on the same documents, with other heads' settings."""
    case = build_case(work, layers=24, width=384, vocabulary=2048, documents=80)
    case.config.train.features = "cache"
    other = replace(case.config, train=replace(case.config.train, decay=0.5))

    kept = features_of(case, "kept")
    size = (kept["train"].path / "hidden.npy").stat().st_size
    online = replace(case.config, train=replace(case.config.train, features="online"))
    cached = Case(case.config, replace(case.inputs, features=kept), work)
    sides: list[Callable[[], object]] = [
        lambda: cached.train(other),
        lambda: case.train(online),
        lambda: (open_fresh(case), cached.train()),
    ]
    for side in sides:
        side()
    second, first_online, first_cached = best_seconds(_REPEATS, *sides, clock=_CLOCK)
    row = Row(
        what="a second training on cached states",
        unit="s",
        ours=second,
        bar=">= 5x less time",
        is_cleared=first_online >= 5 * second,
        reference=first_online,
        ratio=first_online / second,
        details={"first run, states made": first_cached, "states on disk, MB": size / 1e6},
    )
    return [row]


def open_fresh(case: Case) -> None:
    """Make the hidden states once more."""
    features_of(case, f"made up {time.time()}")


def features_of(case: Case, key: str) -> dict[str, Features]:
    """Return the hidden states of the documents, from the cache where they lie under the key."""
    backbone, settings = case.inputs.backbone, FeatureSettings("bf16-mixed", batch_tokens=2048)
    place, dataset = case.config.cache_dir, case.config.dataset
    return {
        split: open_features(
            place, split, examples, dataset, key, settings, backbone, lambda: backbone
        )
        for split, examples in case.inputs.documents.items()
    }


def memory_rows(work: Path) -> list[Row]:
    """Peak memory of one loss with its gradients, in processes of their own."""
    found = {}
    for form in ("recompute", "at_once", "plain"):
        command = [
            sys.executable,
            str(Path(__file__).parent / "rivals" / "plain_training.py"),
            form,
        ]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        [line] = [line for line in output.splitlines() if line.startswith(MEMORY_MARK)]
        found[form] = json.loads(line.removeprefix(MEMORY_MARK))
    ours, plain = found["recompute"]["bytes"] / 1e6, found["plain"]["bytes"] / 1e6
    details = {f"{form}, s": value["seconds"] for form, value in found.items()}
    details["at_once, MB"] = found["at_once"]["bytes"] / 1e6
    row = Row(
        what="memory of the loss, V 128,256, 5 heads",
        unit="MB",
        ours=ours,
        bar="<= 1/8",
        is_cleared=ours <= plain / 8,
        reference=plain,
        ratio=plain / ours,
        details=details,
    )
    return [row]


def teacher_rows(work: Path) -> list[Row]:
    """A step of the heads by a loss of the backbone's distribution, which all heads share."""
    vocabulary, num_tokens = 49_152, 16_384
    case = build_case(work, layers=1, width=512, vocabulary=vocabulary, documents=24)
    backbone = case.inputs.backbone
    counts = torch.arange(vocabulary, 0, -1)
    shape = {"kind": "recurrent", "num_heads": 4, "num_tokens": num_tokens}
    heads = build_heads(backbone, token_counts=counts, **shape)
    batch = ready_batches(case)[0]
    hidden_BTD = backbone.hidden_states(batch.input_ids_BT).detach()

    def step(name: str, most: int) -> Callable[[], None]:
        objective = Objective(loss=name, loss_form="at_once")

        def run() -> None:
            with mock.patch.object(loss, "kept_rows", return_value=most):
                with torch.autocast("cpu", torch.bfloat16):
                    targets = objective.targets(backbone, heads, hidden_BTD, batch)
                    rest = (batch.labeled, batch.input_ids_BT)
                    settings = {"chunk_rows": 256, "form": "at_once"}
                    losses = medusa_losses(heads, hidden_BTD.float(), targets, *rest, **settings)
                    total = medusa_loss(losses, 0.8)
                total.backward()

        return run

    steps = [step("nla", 1 << 20), step("nla", 0), step("ce", 0)]
    kept, asked, ce = best_seconds(_REPEATS, *steps, clock=_CLOCK)
    return [
        Row(
            what="a step of train.loss=nla, the backbone's distribution kept for all heads",
            unit="s",
            ours=kept,
            bar="< computed by each head",
            is_cleared=kept < asked,
            reference=asked,
            ratio=asked / kept,
            details={"train.loss=ce, s": ce, "vocabulary": vocabulary, "of heads": num_tokens},
        )
    ]


def overhead_rows(work: Path) -> list[Row]:
    """What a step takes besides backbone, heads, loss and optimiser: batches and Lightning."""
    # Many documents: what Lightning takes to start up is no part of a step.
    case = build_case(work, layers=6, width=256, vocabulary=2048, documents=480)
    case.train()
    bare_step = bare_epoch(case)
    bare_step()
    whole, bare = best_seconds(_REPEATS, case.train, bare_step, clock=_CLOCK)
    share = 100 * (1 - bare / whole)
    return [
        Row(
            what="share of a step outside the arithmetic",
            unit="%",
            ours=share,
            bar="<= 5 %",
            is_cleared=share <= 5,
            details={"a pass, s": whole, "its arithmetic alone, s": bare},
        )
    ]


def ready_batches(case: Case) -> list[Batch]:
    """Return the batches of a pass."""
    batches = case.inputs.batches(case.config)
    names = ("global_step", "max_steps", "global_rank", "world_size")
    values = (0, batches.batches_per_epoch(), 0, 1)
    batches.trainer = type("Trainer", (), dict(zip(names, values, strict=True)))
    return list(batches.train_dataloader())


def bare_epoch(case: Case) -> Callable[[], None]:
    """Return a pass of nothing but the arithmetic, on batches that are there already."""
    ready = ready_batches(case)
    steps = len(ready)

    def epoch() -> None:
        heads = build_heads(case.inputs.backbone, num_heads=4)
        module = build_module(case.config, case.inputs, heads, steps)
        optimizer = torch.optim.AdamW(heads.parameters(), lr=1e-3)
        for batch in ready:
            with torch.autocast("cpu", torch.bfloat16):
                hidden_BTD = module.backbone.hidden_states(batch.input_ids_BT).detach()
                targets = module.objective.targets(module.backbone, heads, hidden_BTD, batch)
                rest = (batch.labeled, batch.input_ids_BT)
                losses = medusa_losses(heads, hidden_BTD.float(), targets, *rest, chunk_rows=256)
                total = medusa_loss(losses, 0.8)
            total.backward()
            torch.nn.utils.clip_grad_norm_(heads.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return epoch


def replace_form(config: Config, form: str) -> Config:
    """Return the config with another form of the loss."""
    return replace(config, train=replace(config.train, loss_form=form))


_PARTS = {
    "online": online_rows,
    "cache": cache_rows,
    "memory": memory_rows,
    "overhead": overhead_rows,
    "teacher": teacher_rows,
}


def main() -> None:
    """Measure, show and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(_PARTS))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    about = machine()
    rows: list[Row] = []
    for part in arguments.only.split(","):
        with tempfile.TemporaryDirectory() as work:
            rows += _PARTS[part](Path(work))
    show(rows, about)
    if arguments.out:
        write(arguments.out, rows, about)


if __name__ == "__main__":
    main()
