"""Runs against each other: their heads answer the same prompts, in turn, in one process.

    python benchmarks/in_turn.py RUN_DIR RUN_DIR [...] [--prompts 36] [--new-tokens 64]
        [--dtype float32] [--others-trees] [--out FILE]

For heads of one backbone, each with its calibration. Every prompt is answered plainly and by each
run, and who begins changes from prompt to prompt: so a machine whose speed changes slows all of
them alike. Each decodes as its run would (tree, packed layers, int8 heads). Figures of separate
evaluations are of separate minutes, and on a shared machine those compare to a tenth at best.
Steps are all of a response, the prompt's own included, in tokens per step and in milliseconds.
"""

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from measuring import machine

from medusa_exp.decode.decoder import Decoder
from medusa_exp.decode.loop import Response
from medusa_exp.runs.progress import track
from medusa_exp.stages.session import Session
from medusa_exp.tree import Tree

PLAIN = "plain"


@dataclass
class Way:
    """One way to answer, and what its answers took."""

    decoder: Decoder
    tree: Tree | None
    """None decodes plainly."""
    seconds: list[float] = field(default_factory=list)
    """Of each prompt's whole response."""
    tokens: int = 0
    steps: int = 0

    def answer(self, prompt: list[int]) -> Response:
        """Answer a prompt and count it."""
        start = perf_counter()
        if self.tree is None:
            [response] = self.decoder.decode_plain([prompt])
        else:
            [response] = self.decoder.decode([prompt], tree=self.tree)
        self.seconds.append(perf_counter() - start)
        self.tokens += len(response.tokens)
        self.steps += len(response.accept_lengths)
        return response

    def against(self, plain: "Way") -> dict[str, float | int]:
        """Return its figures; speed-ups are over plain decoding of the same prompts."""
        ratios = [one / own for one, own in zip(plain.seconds, self.seconds, strict=True)]
        return {
            "nodes": 1 if self.tree is None else len(self.tree),
            "tokens_per_step": self.tokens / self.steps,
            "step_ms": 1000 * sum(self.seconds) / self.steps,
            "tokens_per_second": self.tokens / sum(self.seconds),
            "speedup": sum(plain.seconds) / sum(self.seconds),
            "speedup_of_median_prompt": median(ratios),
        }


@torch.inference_mode()
def in_turn(ways: dict[str, Way], prompts: list[list[int]]) -> int:
    """Answer all prompts in all ways; return at how many all responses are the same."""
    for way in ways.values():  # what is made at a first call is no part of a response
        way.answer(prompts[0])
        way.seconds, way.tokens, way.steps = [], 0, 0
    order, num_alike = list(ways), 0
    for number, prompt in enumerate(track(prompts, "decoding")):
        first = number % len(order)
        responses = [ways[name].answer(prompt) for name in order[first:] + order[:first]]
        num_alike += all(response.tokens == responses[0].tokens for response in responses)
    return num_alike


def main() -> None:
    """Compare runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--prompts", type=int, default=36, help="of the first run's val split")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--dtype", help="of the backbone, in place of the runs' own")
    parser.add_argument("--others-trees", action="store_true", help="over each other's trees too")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    sessions = {run.name: Session.of_run(run) for run in given.runs}
    if len(sessions) < len(given.runs):
        parser.error("two runs have the same name: rename one's directory.")
    decoders = {}
    for name, session in sessions.items():
        session.config.decode.max_new_tokens = given.new_tokens
        session.config.dtype.backbone = given.dtype or session.config.dtype.backbone
        decoders[name] = session.decoder()
    trees = {name: decoder.tree for name, decoder in decoders.items()}
    ways = {PLAIN: Way(next(iter(decoders.values())), None)}
    for name, decoder in decoders.items():
        ways[name] = Way(decoder, trees[name])
        for other in trees if given.others_trees else ():
            if trees[other] != trees[name]:
                ways[f"{name}, tree of {other}"] = Way(decoder, trees[other])
    session = next(iter(sessions.values()))
    backbone = next(iter(decoders.values())).backbone
    prompts = session.prompts("val", backbone, session.tokenizer(), given.prompts)
    num_alike = in_turn(ways, [prompt.input_ids for prompt in prompts])
    found = {name: way.against(ways[PLAIN]) for name, way in ways.items()}
    for name, figures in found.items():
        print(f"{name:30}", *(f"{what} {value:.3f} " for what, value in figures.items()))
    print(f"identical: {num_alike} of {len(prompts)}")
    record = {"machine": machine(), "prompts": len(prompts), "identical": num_alike, "ways": found}
    if given.out:
        given.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
