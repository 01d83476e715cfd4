"""Which loss and which family of heads make the most tokens per step, greedily and when sampling.

    python benchmarks/acceptance.py FOLDER [--losses ce,lk] [--families medusa,hydra] [--out FILE]
        [KEY=VALUE ...]

Of the model of +experiment=from_scratch by default. Of another one, which has to be in a directory:

    python benchmarks/acceptance.py FOLDER +experiment=self_distill model.path=DIR dataset.path=FILE
        head=medusa_lowrank head.rank=null head.num_tokens=16384 train.max_steps=300

Backbone, responses and hidden states are made once for all cases, which train equally long on them.
The backbone answers held-out prompts, greedily and at temperature 1. Then decoding is replayed on
these answers, half of which choose the trees: no clock is in it, and the noise of the answers is
the same for all cases. Of each case, tokens per step:

    greedy       the best tree of so many nodes
    sampling     the same where tokens are sampled and drafts are the heads' likeliest tokens
    sampled      a chain of drafts that are sampled too, accepted with probability min(1, p / q)
                 (decoding judges the whole chain, and accepts some more)

In the last, a token of the answer was drawn from p. It is the draft token, accepted, in a share
min(1, q / p) of the cases, and in the rest what was drawn after a rejection: with these shares the
number of steps is expected, and nothing is drawn (`expected_steps`).

P positions of a response, K heads, D hidden, T prompt and response but the last.
"""

import argparse
import json
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from measuring import machine
from rich.console import Console
from rich.table import Table
from torch import Tensor

from medusa_exp.cli import compose
from medusa_exp.cli import run as run_experiment
from medusa_exp.config import Config
from medusa_exp.decode.one_call import decode_plain
from medusa_exp.decode.rule import AcceptanceRule
from medusa_exp.model import Backbone, MedusaHeads, load_heads
from medusa_exp.model.heads import heads_input
from medusa_exp.stages.session import Session, limits_of
from medusa_exp.train.acceptance import HeldOutResponse, response_ranks
from medusa_exp.tree.search import best_tree, num_steps
from medusa_exp.tree.tree import chain

_RULES = {"greedy": AcceptanceRule(), "sampling": AcceptanceRule("sampling", seed=0)}


@dataclass
class Answers:
    """Held-out responses under one rule, with the backbone's log-probability of each token."""

    responses: list[HeldOutResponse]
    log_probs: list[Tensor]

    @classmethod
    def of(cls, session: Session, rule: AcceptanceRule, num_prompts: int) -> "Answers":
        """Let the backbone answer prompts of the test split."""
        config, backbone = session.config, session.backbone()
        tokenizer = session.tokenizer()
        prompts = session.prompts("test", backbone, tokenizer, num_prompts)
        asked = [prompt.input_ids for prompt in prompts]
        limits = limits_of(config, backbone, tokenizer)
        found = cls([], [])
        for ids, response in zip(asked, decode_plain(backbone, asked, limits, rule), strict=True):
            found._add(backbone, ids, response.tokens)
        return found

    @torch.inference_mode()
    def _add(self, backbone: Backbone, ids: list[int], tokens: list[int]) -> None:
        whole_1T = torch.tensor([ids + tokens], device=backbone.device)
        hidden_TD = backbone.hidden_states(whole_1T)[0, :-1]
        one = HeldOutResponse(whole_1T[0, len(ids) :], hidden_TD)
        log_p_P = [
            backbone.next_logits(hidden_CD).float().log_softmax(-1).gather(1, tokens_C[:, None])
            for hidden_CD, tokens_C in zip(
                hidden_TD[len(ids) - 1 :].split(64), one.tokens_P.split(64), strict=True
            )
        ]
        self.responses.append(one)
        self.log_probs.append(torch.cat(log_p_P)[:, 0])

    def tokens_per_step(self, heads: MedusaHeads, num_nodes: int) -> tuple[float, float]:
        """Return those of the best tree, chosen by every other response; and of the chain."""
        ranks = [response_ranks(heads, response, 10) for response in self.responses]
        tree = best_tree(ranks[::2], num_nodes, 10)
        judged = ranks[1::2]
        number = sum(len(ranks_PK) for ranks_PK in judged)
        return number / num_steps(judged, tree), number / num_steps(judged, chain(heads.num_heads))

    def sampled(self, heads: MedusaHeads) -> tuple[float, list[float]]:
        """Return tokens per step of a chain of sampled drafts, and each head's acceptance."""
        shares = [
            accept_shares(heads, response, log_p_P)
            for response, log_p_P in zip(self.responses, self.log_probs, strict=True)
        ]
        judged = shares[1::2]
        steps = sum(1 + expected_steps(share_PK) for share_PK in judged)
        of_heads = [
            float(np.concatenate([share_PK[: -1 - k, k] for share_PK in judged]).mean())
            for k in range(heads.num_heads)
        ]
        return sum(len(share_PK) for share_PK in judged) / steps, of_heads


@torch.no_grad()
def accept_shares(heads: MedusaHeads, response: HeldOutResponse, log_p_P: Tensor) -> np.ndarray:
    """Return min(1, q / p) of token t+k at each position t of a response: shares_PK."""
    tokens_P, size = response.tokens_P, len(response.tokens_P)
    read_PD = heads_input(heads.prefix, response.hidden_TD[None])[0][-size:].to(heads.dtype)
    places_P = heads.to_head_vocab(tokens_P)
    shares_PK = np.zeros((size, heads.num_heads))
    for k in range(min(heads.num_heads, size - 1)):
        inputs = [read_PD[: size - 1 - k]]
        if heads.sees_tokens:
            inputs.append(tokens_P.unfold(0, k + 1, 1)[: size - 1 - k])
        log_q_PW = heads.head_logits(k, *inputs).float().log_softmax(-1)
        place_P = places_P[k + 1 :]
        log_q_P = log_q_PW.gather(1, place_P.clamp(min=0)[:, None])[:, 0]
        share_P = (log_q_P - log_p_P[k + 1 :]).clamp(max=0).exp()
        shares_PK[: size - 1 - k, k] = torch.where(place_P < 0, 0, share_P).cpu().numpy()
    return shares_PK


def expected_steps(shares_PK: np.ndarray) -> float:
    """Return the expected steps of a response, the prompt's not among them (`tree.search.replay`).

    shares_PK: with which probability a step at t whose first k drafts passed accepts the next.
    """
    size, num_heads = shares_PK.shape
    at_P = np.zeros(size + num_heads + 1)
    at_P[0] = 1.0  # the probability that a step stands there
    for t in range(size - 1):
        passed = at_P[t]
        for k in range(num_heads):
            at_P[t + k + 1] += passed * (1 - shares_PK[t, k])
            passed *= shares_PK[t, k]
        at_P[t + num_heads + 1] += passed
    return float(at_P[: size - 1].sum())


def train_case(overrides: Sequence[str], folder: Path, name: str) -> Path:
    """Train heads as the command line does, on what all cases share; return the run directory."""
    out = folder / name
    if not (out / "heads").is_dir():
        run_experiment(config_of(overrides, folder), out)
    return out


def config_of(overrides: Sequence[str], folder: Path) -> Config:
    """Compose the experiment, without the stages after the training."""
    own = [] if any("experiment=" in word for word in overrides) else ["+experiment=from_scratch"]
    common = [f"cache_dir={folder.absolute()}/cache", "logger=none", "train.features=cache"]
    chosen = [word for word in common if word.split("=")[0] not in " ".join(overrides)]
    config = compose([*own, *chosen, *overrides])
    kept = [stage for stage in config.stages if stage in ("pretrain", "regenerate", "train")]
    return replace(config, stages=kept)


def measure(
    session: Session, answers: dict[str, Answers], out: Path, nodes: int
) -> dict[str, float]:
    """Return what heads are worth."""
    heads = load_heads(out / "heads", session.backbone())
    found: dict[str, float] = {}
    for name, of_rule in answers.items():
        found[name], found[f"{name}, chain"] = of_rule.tokens_per_step(heads, nodes)
    found["sampled, chain"], alphas = answers["sampling"].sampled(heads)
    found |= {f"alpha {k}": alpha for k, alpha in enumerate(alphas, 1)}
    took = json.loads((out / "run.json").read_text())["stages"]["train"]["seconds"]
    return {**found, "seconds of training": took}


def show(rows: dict[str, dict[str, float]]) -> None:
    """Print a line a case, with its distance from the first."""
    columns = list(next(iter(rows.values())))
    table = Table("case", *columns)
    first = next(iter(rows.values()))
    for name, row in rows.items():
        cells = [f"{row[key]:.3f}" for key in columns[:-1]]
        cells = [
            cell if "alpha" in key else f"{cell} ({row[key] / first[key] - 1:+.1%})"
            for cell, key in zip(cells, columns, strict=False)
        ]
        table.add_row(name, *cells, f"{row[columns[-1]]:.0f}")
    Console(width=230).print(table)


def main() -> None:
    """Train, replay, print the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of the cases' run directories, and the cache")
    parser.add_argument("--losses", default="ce,kl,topk_kl,tv,nla,lk")
    parser.add_argument("--families", default="medusa", help="words of head.kind")
    parser.add_argument("--cases", nargs="*", default=[], help="more: NAME:KEY=VALUE,KEY=VALUE")
    parser.add_argument("--num-prompts", type=int, default=64)
    parser.add_argument("--nodes", type=int, default=16)
    parser.add_argument("--out", type=Path)
    arguments, overrides = parser.parse_known_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    arguments.folder.mkdir(exist_ok=True)
    cases: dict[str, list[str]] = {}
    for family in arguments.families.split(","):
        for loss in arguments.losses.split(","):
            chosen = [] if family == "medusa" else [f"head.kind={family}"]
            cases[f"{family} {loss}"] = [f"train.loss={loss}", *chosen]
    for case in arguments.cases:
        name, _, keys = case.partition(":")
        cases[name] = keys.split(",")
    rows: dict[str, dict[str, float]] = {}
    session: Session | None = None
    for name, keys in cases.items():
        out = train_case([*overrides, *keys], arguments.folder, name.replace(" ", "_"))
        if session is None:
            session = Session(config_of(overrides, arguments.folder), out)
            answers = {
                rule: Answers.of(session, _RULES[rule], arguments.num_prompts) for rule in _RULES
            }
        rows[name] = measure(session, answers, out, arguments.nodes)
        show(rows)
    if arguments.out:
        found = {"cases": cases, "overrides": overrides, "machine": machine(), "rows": rows}
        arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
