"""Tree decoding measured: is it lossless, how fast is it, and how near to what it could be?

    python benchmarks/decode.py RUN_DIR [--prompts 40] [--json FILE]

RUN_DIR is a finished run, the quickstart's for one: its model, heads and prompts are measured. What
must be the same token for token is tried on tiny random models of many architectures.
"""

import argparse
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from measuring import Row, machine, show, write
from rich.progress import track
from torch import nn

from medusa_exp.data.batching import label_positions
from medusa_exp.decode.decoder import Decoder
from medusa_exp.decode.loop import Limits
from medusa_exp.decode.one_call import decode_plain
from medusa_exp.decode.rule import GREEDY
from medusa_exp.evaluate.methods import Method, build_methods, timed
from medusa_exp.evaluate.near_ties import find_difference
from medusa_exp.evaluate.step_profile import BACKBONES, profile
from medusa_exp.model import Backbone, build_heads
from medusa_exp.model.loss import medusa_loss, medusa_losses
from medusa_exp.model.targets import TokenTargets
from medusa_exp.runs.files import read_json
from medusa_exp.stages.evaluate import load_prompts
from medusa_exp.stages.session import Session
from medusa_exp.tree import Tree

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
from tiny_models import ARCHITECTURES, VOCAB_SIZE, build_model

_TINY_PROMPTS = 25
_NEW_TOKENS = 32


def main() -> None:
    """Measure, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    here = machine()
    run = Run(arguments.run_dir, arguments.prompts)
    rows = [identity(), near_ties(run), *speed(run), prediction(run)]
    show(rows, here)
    if arguments.json:
        write(arguments.json, rows, here)


class Run:
    """A finished run: its model, heads, trees and prompts."""

    def __init__(self, out: Path, num_prompts: int) -> None:
        self.out, self.session = out, Session.of_run(out)
        self.session.config.evaluate.num_prompts = num_prompts
        self.decoder = self.session.decoder(is_tree_known=False)
        found = load_prompts(
            self.session,
            self.session.tokenizer(),
            self.decoder.backbone.max_length,
            lambda ids: self.decoder.decode_plain([ids], rule=GREEDY)[0].tokens,
        )
        self.prompts = [prompt.input_ids for prompt in found]

    def tree(self, kind: str) -> Tree:
        """Return the tree that `tree=kind` names."""
        self.session.config.tree.kind = kind
        return self.session.tree(self.decoder)


def identity() -> Row:
    """Compare tree decoding with plain decoding, in float32."""
    cases = [
        (architecture, is_trained, batch_size)
        for architecture in sorted(ARCHITECTURES)
        for is_trained in (False, True)
        for batch_size in (1, 2, 3, 4)
    ]
    answers = different = accepted = steps = 0
    for architecture, is_trained, batch_size in track(cases, "tiny models"):
        rng = random.Random(f"{architecture} {is_trained} {batch_size}")
        backbone = Backbone(build_model(architecture))
        heads = build_heads(backbone, num_heads=3)
        if is_trained:
            train_on_own_answers(backbone, heads, rng)
        tree = random_tree(rng, heads.num_heads)
        for prompts in batches(rng, batch_size):
            limits = Limits(_NEW_TOKENS, {rng.randrange(VOCAB_SIZE)})
            ours = Decoder(backbone, heads, tree).decode(prompts, limits)
            for prompt, answer in zip(prompts, ours, strict=True):
                [plain] = decode_plain(backbone, [prompt], limits)
                answers += 1
                different += answer.tokens != plain.tokens
                accepted += len(answer.tokens) - len(answer.accept_lengths)
                steps += len(answer.accept_lengths)
    return Row(
        "answers that differ, float32",
        "",
        different,
        "0",
        different == 0,
        details={
            "answers": answers,
            "architectures": len(ARCHITECTURES),
            "tokens per step": 1 + accepted / steps,
        },
    )


def random_tree(rng: random.Random, depth: int) -> Tree:
    """Return a tree of up to 20 nodes, with ranks up to 5."""
    paths: set[tuple[int, ...]] = {()}
    for _ in range(rng.randint(1, 40)):
        parent = rng.choice(sorted(paths))
        if len(parent) < depth and len(paths) < 20:
            paths.add((*parent, rng.randrange(6)))
    return Tree.from_paths(paths)


def batches(rng: random.Random, batch_size: int) -> Iterator[list[list[int]]]:
    """Yield prompts of ragged lengths, so many at a time."""
    prompts = [
        [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 30))] for _ in range(_TINY_PROMPTS)
    ]
    for start in range(0, len(prompts), batch_size):
        yield prompts[start : start + batch_size]


def train_on_own_answers(backbone: Backbone, heads: nn.Module, rng: random.Random) -> None:
    """Teach heads what this random model says, until they guess a good part of it."""
    prompts = [[rng.randrange(VOCAB_SIZE) for _ in range(8)] for _ in range(16)]
    answers = decode_plain(backbone, prompts, Limits(64))
    ids_BT = torch.tensor([p + a.tokens for p, a in zip(prompts, answers, strict=True)])
    everything_BT = torch.ones_like(ids_BT)
    with torch.no_grad():
        hidden_BTD = backbone.hidden_states(ids_BT)
    labeled = label_positions(everything_BT.bool(), everything_BT, heads.num_heads)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=1e-2)
    for _ in range(40):
        losses = medusa_losses(
            heads,
            hidden_BTD,
            TokenTargets(ids_BT),
            labeled,
            ids_BT,
            chunk_rows=256,
        )
        optimizer.zero_grad()
        medusa_loss(losses, 0.8).backward()
        optimizer.step()


def near_ties(run: Run) -> Row:
    """In bfloat16, look at every answer that differs from plain decoding's."""
    model = run.decoder.backbone.model
    dtype = model.dtype
    model.to(torch.bfloat16)
    tree = run.tree("calibrated")
    found = []
    for prompt in track(run.prompts, "bfloat16"):
        [plain] = run.decoder.decode_plain([prompt], rule=GREEDY)
        [ours] = run.decoder.decode([prompt], tree=tree, rule=GREEDY)
        difference = find_difference(
            run.decoder.backbone, prompt, plain.tokens, ours.tokens, tree.num_checked
        )
        found += [difference] if difference else []
    model.to(dtype)
    unexplained = sum(not difference.is_near_tie for difference in found)
    return Row(
        "bfloat16 differences that are no near-ties",
        "",
        unexplained,
        "0",
        unexplained == 0,
        details={
            "answers": len(run.prompts),
            "differ": len(found),
            "margin / noise": ", ".join(f"{d.margin:.3f} / {d.noise:.3f}" for d in found),
        },
    )


def speed(run: Run) -> list[Row]:
    """Compare trees on the same heads, and the fastest with what its steps would allow."""
    decoder = run.decoder
    decoder.rule = GREEDY
    trees = {name: run.tree(name) for name in ("calibrated", "chain", "medusa_63", "dynamic")}
    methods: dict[str, Method] = {}
    for name, decoder.tree in trees.items():
        built = build_methods(decoder, baselines=[])
        methods |= {"plain": built["plain"], name: built["tree"]}
    seconds, steps = dict.fromkeys(methods, 0.0), dict.fromkeys(methods, 0)
    tokens = 0
    for number, prompt in enumerate(track(run.prompts, "speed")):
        names = list(methods)
        names = names[number % len(names) :] + names[: number % len(names)]
        for name in names:
            [answer], taken = timed(methods[name], [prompt], decoder.backbone.device)
            seconds[name] += taken
            steps[name] += answer.num_steps
            tokens += len(answer.tokens) if name == "plain" else 0
    speedups = {name: seconds["plain"] / taken for name, taken in seconds.items()}
    others = {name: speedups[name] for name in ("chain", "medusa_63", "dynamic")}
    fixed_best = max(others["chain"], others["medusa_63"])
    sample = run.prompts[:8]
    decoder.tree = trees["calibrated"]
    shares = profile(decoder, sample)[0].shares()
    share = 1 - sum(shares[part] for part in BACKBONES)
    return [
        Row(
            "speed-up, calibrated tree",
            "x",
            speedups["calibrated"],
            "fastest, within 3 %",
            speedups["calibrated"] >= 0.97 * fixed_best,
            details={
                **others,
                "nodes": trees["calibrated"].num_checked,
                "tokens per step": {name: round(tokens / n, 2) for name, n in steps.items()},
            },
        ),
        Row(
            "achieved / bound of backbone and heads",
            "",
            1 - share + shares["heads"],
            "0.9",
            1 - share + shares["heads"] >= 0.9,
            details={"outside the backbone": share, "of which drafting": shares["heads"]},
        ),
    ]


def prediction(run: Run) -> Row:
    """Hold what calibration promised against what the run's evaluation found."""
    metrics = read_json(run.out / "metrics.json")
    ratio = metrics["calibrate/predicted_speedup"] / metrics["eval/speedup"]
    return Row(
        "speed-up promised / found in the run",
        "",
        ratio,
        "0.9 to 1.1",
        0.9 <= ratio <= 1.1,
        details={name: metrics[name] for name in ("calibrate/predicted_speedup", "eval/speedup")},
    )


if __name__ == "__main__":
    main()
