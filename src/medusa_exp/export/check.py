"""What is wrong with a directory of Medusa heads: `python -m medusa_exp.export.check DIR`.

It tells which format it is of, whether an engine would load it, and what it would silently get
wrong; with `--target MODEL` also whether the heads are that model's, by what both say of
themselves and by how often each head's first choice is the token that it should predict. Exit code
0 is for no error, 1 for some.

K heads, P positions, J offsets, D hidden.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from medusa_exp.config import ModelConfig
from medusa_exp.errors import as_program
from medusa_exp.export.declared import Fault
from medusa_exp.export.faults import all_faults
from medusa_exp.export.formats import WHOLE_MODEL
from medusa_exp.export.hf_generate import is_whole_model
from medusa_exp.export.reading import FORMATS, NoHeadsError, Reading, read_heads
from medusa_exp.model.backbone import Backbone
from medusa_exp.model.loading import load_backbone
from medusa_exp.model.source import ModelSpec

ENGINES = {
    "medusa_exp": "medusa_exp itself; stage export makes what engines load",
    "vllm": "vLLM with medusa_exp installed beside it (method mtp)",
    "vllm_medusa": "vLLM up to 0.32 (method medusa)",
    "tgi": "TGI; vLLM 0.25 to 0.32 takes the names too, if the config is of its form",
    "mlc": "MLC-LLM",
    WHOLE_MODEL: "transformers with medusa_exp installed beside it: a whole model and its heads",
    "modelopt": "none as it is: import it by heads_from, and export it",
}
_ROWS, _TOKENS = 12, 40
"""Greedy texts of the target on which heads are tried, and how long they are."""
_CLEARLY = 1.5
"""So many times as often has a head to be right at another place than its own to be misplaced."""
_LEAST = 0.05
"""Share of right first choices below which a head is as good as none."""


def check(named: str, target: str | None = None, device: str = "auto") -> tuple[str, list[Fault]]:
    """Return in a few words what a directory is, and its faults.

    Raises:
        UserError: there is no such directory, or the target cannot be loaded.
    """
    try:
        reading = read_heads(named)
    except NoHeadsError as error:
        return "nothing that can be read as heads", [Fault(error.fault, str(error))]
    faults = all_faults(reading)
    if target is not None and reading.heads:
        faults += _against_target(reading, target, device, is_whole=not _blocks(faults))
    engine = WHOLE_MODEL if is_whole_model(Path(named).expanduser()) else reading.format
    return _what(reading, ENGINES[engine]), faults


def _what(reading: Reading, engine: str) -> str:
    number, layers = len(reading.heads), reading.num_layers
    what = f"{FORMATS[reading.format]}: {number} heads of {layers} blocks"
    if reading.declared.backbone:
        what += f", for {reading.declared.backbone}"
    return f"{what}\nloaded by: {engine}"


def _blocks(faults: list[Fault]) -> bool:
    """Is something wrong that leaves no logits to look at?"""
    names = {"tensors missing", "projections missing", "wrong shape", "truncated vocabulary"}
    is_crooked = any(f.name == "transposed" and "shape" in f.text for f in faults)
    return is_crooked or any(fault.is_error and fault.name in names for fault in faults)


def _against_target(reading: Reading, target: str, device: str, *, is_whole: bool) -> list[Fault]:
    backbone = load_backbone(ModelSpec(ModelConfig(path=target), device=device))
    faults = list(_identity(reading, backbone, target))
    if is_whole and not any(fault.is_error for fault in faults):
        faults += _acceptance(reading, backbone)
    return faults


def _identity(reading: Reading, backbone: Backbone, target: str) -> Iterator[Fault]:
    """Compare what the heads say of their target with what this one is."""
    declared = reading.declared
    for what, theirs, ours in (
        ("hidden size", reading.hidden_size, backbone.hidden_size),
        ("vocabulary", declared.vocab_size, backbone.vocab_size),
        ("identity", declared.backbone_identity, backbone.identity()),
    ):
        if theirs not in (None, "") and theirs != ours:
            text = f"the heads are for a model of {what} {theirs}, and {target} has {ours}"
            yield Fault("other target", text)
    if reading.shared is not None:
        weight = backbone.lm_head.weight.detach().cpu()
        if weight.shape != reading.shared.shape or not _nearly(weight, reading.shared):
            text = f"their lm_head.weight is not the lm_head of {target}"
            yield Fault("other target", text)


def _nearly(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.to(torch.bfloat16), other.to(torch.bfloat16))


def _acceptance(reading: Reading, backbone: Backbone) -> Iterator[Fault]:
    """Look at which offset of the target's own text each head's first choices are right."""
    right_KJ = first_choices(reading, backbone)
    for k, right_J in enumerate(right_KJ.tolist()):
        own, best = right_J[k + 1], max(range(len(right_J)), key=lambda j: right_J[j])
        says = f"head {k + 1}'s first choice is right for {own:.0%} of tokens"
        if best not in (0, k + 1) and right_J[best] > max(_CLEARLY * own, _LEAST):
            text = f"{says}, and for {right_J[best]:.0%} of those that head {best} should predict"
            yield Fault("heads swapped", f"{text}: they are out of order")
        elif best == 0 and right_J[0] > max(_CLEARLY * own, _LEAST):
            text = f"{says}, and for {right_J[0]:.0%} of those that the target itself predicts"
            yield Fault("one place off", f"{text}: the head is untrained, or counts places anew")
        elif own < _LEAST:
            text = f"{says}: it is of another target, transposed, untrained, or lacks tensors"
            yield Fault("accepts nothing", text)


@torch.inference_mode()
def first_choices(reading: Reading, backbone: Backbone) -> Tensor:
    """Return right_KJ: how often head k+1's first choice is the token j+1 places on.

    The text is `greedy_text`; tokens that only repeat the one before are left out: any head is
    right about them.
    """
    ids_BT = greedy_text(backbone)
    hidden_BTD = backbone.hidden_states(ids_BT).float().cpu()
    embedded_BTD = backbone.model.get_input_embeddings()(ids_BT).float().cpu()
    ids_BT, lm_head = ids_BT.cpu(), backbone.lm_head.cpu()
    states_BTD = reading.prefixed(hidden_BTD)
    number = len(reading.heads)
    right_KJ = torch.zeros(number, number + 1)
    length = ids_BT.shape[1] - number - 1
    for k in range(number):
        windows = [embedded_BTD[:, j + 1 : j + 1 + length] for j in range(k + 1)]
        embedded_RJD = torch.stack(windows, 2).flatten(0, 1)
        states_RD = states_BTD[:, :length].flatten(0, 1)
        choice_BT = reading.logits(k, states_RD, embedded_RJD, lm_head).argmax(-1)
        choice_BT = choice_BT.unflatten(0, (len(ids_BT), length))
        for j in range(number + 1):
            truth_BT, before_BT = (ids_BT[:, j + s : j + s + length] for s in (1, 0))
            is_new_BT = truth_BT != before_BT
            hits = ((choice_BT == truth_BT) & is_new_BT).sum()
            right_KJ[k, j] = hits / is_new_BT.sum().clamp(min=1)
    return right_KJ


@torch.no_grad()
def greedy_text(backbone: Backbone) -> Tensor:
    """Return ids_BT that the target says after single tokens, spread over its vocabulary."""
    start_B = torch.linspace(0, backbone.vocab_size - 1, _ROWS).long()
    ids_BT = start_B[:, None].to(backbone.device)
    for _ in range(_TOKENS):
        hidden_BTD = backbone.hidden_states(ids_BT)
        next_B1 = backbone.next_logits(hidden_BTD[:, -1]).argmax(-1, keepdim=True)
        ids_BT = torch.cat([ids_BT, next_B1], 1)
    return ids_BT


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m medusa_exp.export.check")
    parser.add_argument("directory", help="of heads, in any format")
    parser.add_argument("--target", help="directory or hub name of the model that they are for")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    asked = parser.parse_args(arguments)
    with as_program():
        what, faults = check(asked.directory, asked.target, asked.device)
        print(what)
        for fault in faults:
            print(f"{'error' if fault.is_error else 'note'}: {fault.name}: {fault.text}")
        is_wrong = any(fault.is_error for fault in faults)
        if not is_wrong:
            print("no error found" if asked.target else "no error found; --target would say more")
    return int(is_wrong)


if __name__ == "__main__":
    sys.exit(main())
