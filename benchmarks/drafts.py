"""Tokens per step when sampling: the likeliest tokens as drafts against draws from the heads.

    python benchmarks/drafts.py RUN_DIR [--nodes 16] [--temperature 1] [--prompts 32] [--out FILE]

Same heads, same number of nodes, same prompts (half of those held out; by the other half each
rule's tree is chosen, by replay). The rules answer every prompt in turn; what is counted is tokens
and steps without the prompts' own, and the seconds of steps. `compare_drafts` does it for whoever
has a decoder.
"""

import argparse
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from medusa_exp.decode.decoder import Decoder
from medusa_exp.decode.loop import Limits
from medusa_exp.decode.replay import drawn_ranks
from medusa_exp.decode.rule import AcceptanceRule
from medusa_exp.model import load_heads
from medusa_exp.model.heads import MedusaHeads, heads_input, stack_heads
from medusa_exp.model.scoring import answer_ranks
from medusa_exp.stages.session import Session, limits_of
from medusa_exp.tree.search import best_tree, num_steps

MAX_RANK = 10


@dataclass
class Count:
    """What decoding by one rule came to."""

    draft: str
    num_nodes: int
    expected: float
    """Tokens per step of the replay that chose the tree, prompts' steps included; of sampled drafts
    by recursive rejection, which accepts less than decoding."""
    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0

    def as_record(self) -> dict[str, float | str]:
        """Return it with tokens per step and per second."""
        return {
            **asdict(self),
            "tokens_per_step": self.tokens / max(1, self.steps),
            "tokens_per_second": self.tokens / max(1e-9, self.seconds),
        }


@torch.inference_mode()
def compare_drafts(
    decoder: Decoder,
    heads: MedusaHeads,
    prompts: list[list[int]],
    *,
    num_nodes: int,
    limits: Limits,
    rule: AcceptanceRule,
    batch_size: int = 1,
    num_answers: int = 1,
) -> list[Count]:
    """Return what both kinds of drafts come to, each over its own best tree of so many nodes.

    Args:
        decoder: of the model with these heads.
        heads: as they were trained.
        prompts: of which the first half chooses the trees.
        num_nodes: of both trees, the root included.
        limits: where responses end.
        rule: sampling, with the temperature and filters.
        batch_size: prompts that are answered at a time.
        num_answers: to each prompt, drawn by other numbers.
    """
    backbone, half = decoder.backbone, len(prompts) // 2
    ranks: dict[str, list] = {"top": [], "sampled": []}
    by_top = replace(rule, seed=0, draft="top")
    responses = decoder.decode_plain(prompts[:half], limits, rule=by_top)
    for number, (prompt, response) in enumerate(zip(prompts[:half], responses, strict=True)):
        of_prompt = replace(rule, seed=number)
        ids_1T = torch.tensor([prompt + response.tokens], device=backbone.device)
        hidden_TD, tokens_P = backbone.hidden_states(ids_1T)[0, :-1], ids_1T[0, len(prompt) :]
        read_PD = heads_input(heads.prefix, hidden_TD[None])[0, -len(tokens_P) :]
        ranks["top"].append(answer_ranks(heads, tokens_P, read_PD, MAX_RANK))
        ranks["sampled"].append(
            drawn_ranks(backbone, heads, tokens_P, hidden_TD, of_prompt, MAX_RANK)
        )
    total = sum(map(len, ranks["top"]))
    trees, counts = {}, {}
    for draft, found in ranks.items():
        tree = best_tree(found, num_nodes, MAX_RANK, is_drawn=draft == "sampled")
        trees[draft] = tree
        counts[draft] = Count(draft, len(tree), total / num_steps(found, tree))
    starts = range(half, len(prompts), batch_size)
    for answer, start in [(answer, start) for answer in range(num_answers) for start in starts]:
        for draft in trees:
            by = replace(rule, seed=1000 * (answer + 1) + start, draft=draft)
            some = prompts[start : start + batch_size]
            responses = decoder.decode(some, limits, tree=trees[draft], rule=by)
            for response in responses:
                counts[draft].tokens += sum(response.accept_lengths[1:])
                counts[draft].steps += len(response.accept_lengths[1:])
            longest = max(responses, key=lambda response: len(response.step_seconds))
            counts[draft].seconds += sum(longest.step_seconds[1:])
    return list(counts.values())


def main() -> None:
    """Measure a run's heads."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--nodes", type=int, default=16)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--answers", type=int, default=1, help="to each prompt")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    session = Session.of_run(given.run, None)
    backbone, tokenizer = session.backbone(), session.tokenizer()
    heads = load_heads(given.run / "heads", backbone)
    decoder = Decoder(backbone, stack_heads(heads, backbone))
    limits = replace(
        limits_of(session.config, backbone, tokenizer), max_new_tokens=given.new_tokens
    )
    prompts = session.prompts("val", backbone, tokenizer, given.prompts)
    counts = compare_drafts(
        decoder,
        heads,
        [prompt.input_ids for prompt in prompts],
        num_nodes=given.nodes,
        limits=limits,
        rule=AcceptanceRule("sampling", given.temperature),
        batch_size=given.batch_size,
        num_answers=given.answers,
    )
    records = [count.as_record() for count in counts]
    print(json.dumps(records, indent=2))
    if given.out:
        given.out.write_text(json.dumps(records, indent=2) + "\n")


if __name__ == "__main__":
    main()
