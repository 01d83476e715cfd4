"""Training as it is first written: every sequence padded to the limit, the logits of all heads made
at every position at once. What the benchmark of training compares with.

As a program it measures the memory of one loss:

    python benchmarks/rivals/plain_training.py plain|recompute|at_once
"""

import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from medusa_exp.data.batching import label_positions
from medusa_exp.model import Backbone, MedusaHeads, build_heads
from medusa_exp.model.loss import medusa_loss, medusa_losses
from medusa_exp.model.targets import TokenTargets
from medusa_exp.stages.training_inputs import Inputs

MEMORY_MARK = "memory: "
_LABELS, _WIDTH, _VOCABULARY, _HEADS = 1024, 256, 128_256, 5


def plain_epoch(inputs: Inputs, *, num_heads: int, rows: int, length: int) -> None:
    """Train for one pass."""
    backbone, documents = inputs.backbone, inputs.documents["train"]
    heads = build_heads(backbone, num_heads=num_heads)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=1e-3)
    for start in range(0, len(documents), rows):
        some = documents[start : start + rows]
        ids_BT, labels_BT = torch.zeros(2, rows, length, dtype=torch.long)
        labels_BT.fill_(-100)
        for row, example in enumerate(some):
            ids = torch.from_numpy(example.input_ids.copy()).long()
            ids_BT[row, : len(ids)] = ids
            labels_BT[row, : len(ids)] = ids.where(
                torch.from_numpy(example.is_trained.copy()), -100
            )
        with torch.autocast("cpu", torch.bfloat16):
            loss = plain_loss(backbone, heads, ids_BT, labels_BT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(heads.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def plain_loss(backbone: Backbone, heads: MedusaHeads, ids_BT: Tensor, labels_BT: Tensor) -> Tensor:
    """Return the sum of the heads' mean cross entropies, weighted by 0.8**k."""
    with torch.no_grad():
        hidden_BTD = backbone.hidden_states(ids_BT).float()
    logits_BTKV = heads(hidden_BTD).float()
    return sum(
        0.8**k
        * cross_entropy(
            logits_BTKV[:, : -1 - k, k - 1].flatten(0, 1), labels_BT[:, 1 + k :].flatten()
        )
        for k in range(1, heads.num_heads + 1)
    )  # type: ignore[return-value]


def measure_memory(form: str) -> dict[str, float]:
    """Return the peak of one loss and its gradients above parameters and gradients, and seconds."""
    heads = _large_heads()
    hidden_1TD = torch.randn(1, _LABELS + 1 + _HEADS, _WIDTH)
    ids_1T = torch.randint(0, _VOCABULARY, hidden_1TD.shape[:2])
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is in use
    before = _resident("VmRSS")
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16):
        loss = _loss(form, heads, hidden_1TD, ids_1T)
    loss.backward()
    seconds = time.perf_counter() - start
    gradients = sum(p.grad.nbytes for p in heads.parameters() if p.grad is not None)
    return {"bytes": _resident("VmHWM") - before - gradients, "seconds": seconds}


def _loss(form: str, heads: MedusaHeads, hidden_1TD: Tensor, ids_1T: Tensor) -> Tensor:
    if form == "plain":
        logits_1TKV = heads(hidden_1TD).float()
        losses = [
            cross_entropy(logits_1TKV[0, :_LABELS, k], ids_1T[0, k + 2 : k + 2 + _LABELS])
            for k in range(_HEADS)
        ]
        return torch.stack(losses).sum()
    one_1T = torch.ones_like(ids_1T)
    rest = (label_positions(one_1T.bool(), one_1T, _HEADS), ids_1T)
    targets = TokenTargets(ids_1T)
    parts = medusa_losses(heads, hidden_1TD, targets, *rest, chunk_rows=256, form=form)
    return medusa_loss(parts, 1.0)


def _large_heads() -> MedusaHeads:
    from medusa_exp.model import MedusaHeadsConfig

    config = MedusaHeadsConfig(
        num_heads=_HEADS, num_layers=1, hidden_size=_WIDTH, vocab_size=_VOCABULARY
    )
    return MedusaHeads(config)


def _resident(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    [line] = [line for line in lines if line.startswith(what + ":")]
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    print(MEMORY_MARK + json.dumps(measure_memory(sys.argv[1])))
