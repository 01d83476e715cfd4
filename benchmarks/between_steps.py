"""What the host takes between two captured steps: so long a GPU would stand still.

    python benchmarks/between_steps.py [--slots 1,16,128] [--out FILE]

A tiny model decodes in slots, plainly and over a chain of three draft tokens. Steps are done as
soon as they are begun, as if by a device: what the host does before it asks for their outcome
would be beside the device's work, as long as that takes longer, and does not count. Gaps in which
prompts are run are left out. The reference begins no step before it has dealt with the last one.
"""

import argparse
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any
from unittest import mock

import torch
from measuring import Row, machine, show, write
from transformers import LlamaConfig, LlamaForCausalLM

from medusa_exp.decode.decoder import Decoder
from medusa_exp.decode.loop import Limits
from medusa_exp.decode.slots import Request, Slots
from medusa_exp.decode.step import CapturedStep, tokens_of
from medusa_exp.model import Backbone, build_heads
from medusa_exp.tree import chain

_NEW_TOKENS = 200


class Gaps:
    """The seconds from each outcome that is asked for to the next step's beginning."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._asked: float | None = None

    def start(self, step: CapturedStep) -> None:
        """Stand for `CapturedStep.start` of a device that takes no time."""
        if self._asked is not None:
            self.seconds.append(perf_counter() - self._asked)
        step._run()
        step.is_at_work, self._asked = True, None

    def finish(self, step: CapturedStep) -> list[list[int]]:
        """Stand for `CapturedStep.finish`."""
        self._asked, step.is_at_work = perf_counter(), False
        rows = step.outcome.tolist()
        return tokens_of([rows[row] for row in step.active])

    def prefill(self, slots: Slots, group: list[Any]) -> list[list[int]]:
        """Stand for `Slots._prefill`."""
        self._asked = None
        return _prefill(slots, group)


_prefill = Slots._prefill


def _never(slots: Slots, running: list[Any]) -> bool:  # a mock would take long itself
    return False


def measure(decoder: Decoder, num_slots: int, *, is_plain: bool, is_beside: bool) -> float:
    """Return the median gap in microseconds; responses end at many different times.

    Args:
        decoder: decodes.
        num_slots: at a time.
        is_plain: without draft tokens.
        is_beside: is what a step gave looked at beside the next, where it can be?
    """
    gaps = Gaps()
    stand_ins = [
        mock.patch.object(CapturedStep, "start", lambda step: gaps.start(step)),
        mock.patch.object(CapturedStep, "finish", lambda step: gaps.finish(step)),
        mock.patch.object(Slots, "_prefill", lambda slots, group: gaps.prefill(slots, group)),
    ]
    if not is_beside:
        stand_ins.append(mock.patch.object(Slots, "_may_start", _never))
    draws = torch.Generator().manual_seed(0)
    lengths = torch.randint(_NEW_TOKENS // 10, _NEW_TOKENS, (4 * num_slots,), generator=draws)
    requests = [Request([3, 1, 4], Limits(length, {1000}), 300) for length in lengths.tolist()]
    with ExitStack() as stack:
        for stand_in in stand_ins:
            stack.enter_context(stand_in)
        slots = decoder.slots(num_slots, 300, decoder.root_only() if is_plain else None)
        assert sum(1 for _ in slots.decode(requests)) == len(requests)
    return 1e6 * median(gaps.seconds)


def main() -> None:
    """Print the gaps."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--slots", default="1,16,128")
    parser.add_argument("--out", type=Path, help="write a JSON file")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=1024,
    )
    backbone = Backbone(LlamaForCausalLM(config).eval())
    decoder = Decoder(backbone, build_heads(backbone, num_heads=3), chain(3), cuda_graph=True)
    rows, told = [], machine()
    for num_slots in map(int, arguments.slots.split(",")):
        for way in ("plain", "tree"):
            ours, reference = (
                measure(decoder, num_slots, is_plain=way == "plain", is_beside=is_beside)
                for is_beside in (True, False)
            )
            what = f"between {way} steps, {num_slots} slots"
            bar, ratio = "shorter than one after the other", reference / ours
            rows.append(Row(what, "us", ours, bar, ratio > 1, reference, ratio))
    show(rows, told)
    if arguments.out:
        write(arguments.out, rows, told)


main()
