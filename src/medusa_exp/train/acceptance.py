"""Acceptance in validation: the tokens per step that decoding with the heads of now would give.

The backbone answers held-out prompts once, before the training. A validation then looks up which
draft token of each head is accepted at each position of these responses, and replays decoding from
that (`tree/search.py`; of sampled drafts decoding makes some more). The loss says how surprised
heads are everywhere; this, what they are worth.

P positions of a response, T of prompt and response but the last, D hidden, K heads.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from medusa_exp.data.prompts import Prompt
from medusa_exp.decode.loop import Limits
from medusa_exp.decode.one_call import decode_plain
from medusa_exp.decode.replay import drawn_ranks
from medusa_exp.decode.rule import GREEDY, AcceptanceRule
from medusa_exp.model.backbone import Backbone
from medusa_exp.model.checkpoint import save_tensors
from medusa_exp.model.heads import MedusaHeads, heads_input
from medusa_exp.model.scoring import answer_ranks
from medusa_exp.runs.cache import entry
from medusa_exp.runs.files import content_key
from medusa_exp.tree.search import best_tree, num_steps
from medusa_exp.tree.tree import chain

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeldOutResponse:
    """The backbone's response to a held-out prompt."""

    tokens_P: Tensor
    hidden_TD: Tensor
    """States of prompt and response; the last P gave the tokens of the response."""


def accept_lengths(
    heads: MedusaHeads,
    responses: Sequence[HeldOutResponse],
    num_nodes: int,
    max_rank: int,
    rule: AcceptanceRule = GREEDY,
    backbone: Backbone | None = None,
) -> tuple[float, float]:
    """Return the tokens per step of the best tree of so many nodes, and of the chain.

    Prompts' steps are counted, as in eval/tokens_per_step. `rule` is that by which the responses
    were made; one that samples its drafts needs the backbone, perhaps without its layers.
    """
    if is_drawn := rule.draft == "sampled":
        assert backbone is not None
        ranks = [
            drawn_ranks(
                backbone,
                heads,
                response.tokens_P,
                response.hidden_TD,
                replace(rule, seed=(rule.seed or 0) + number),
                max_rank,
            )
            for number, response in enumerate(responses)
        ]
    else:
        ranks = [response_ranks(heads, response, max_rank) for response in responses]
    num_tokens = sum(len(ranks_PK) for ranks_PK in ranks)
    trees = (best_tree(ranks, num_nodes, max_rank, is_drawn=is_drawn), chain(heads.num_heads))
    of_best, of_chain = (num_tokens / num_steps(ranks, tree) for tree in trees)
    return of_best, of_chain


@torch.no_grad()
def response_ranks(heads: MedusaHeads, response: HeldOutResponse, max_rank: int) -> np.ndarray:
    """Return `model.scoring.answer_ranks` of a response: ranks_PK."""
    read_TD = heads_input(heads.prefix, response.hidden_TD[None])[0]
    tokens_P = response.tokens_P
    return answer_ranks(heads, tokens_P, read_TD[len(read_TD) - len(tokens_P) :], max_rank)


def held_out_responses(
    cache_dir: str,
    key: str,
    prompts: list[Prompt],
    limits: Limits,
    ends: Backbone,
    body: Callable[[], Backbone],
    rule: AcceptanceRule,
) -> list[HeldOutResponse]:
    """Return the backbone's responses to held-out prompts, from the cache where it has them.

    `ends` is the backbone, perhaps without its layers; `body` loads it with them.
    """
    if not prompts:
        return []
    with entry(cache_dir, "continuations", f"{key}.safetensors", _is_whole) as (path, partial):
        if partial is not None:
            save_tensors(_as_tensors(respond_to_prompts(prompts, limits, body(), rule)), partial)
    return _from_tensors(load_file(path, device=str(ends.device)))


def responses_key(
    prompts: list[Prompt],
    limits: Limits,
    backbone: Backbone,
    attn_implementation: str | None,
    rule: AcceptanceRule = GREEDY,
) -> str:
    """Name all that decides the responses and their hidden states."""
    draws = [rule.temperature, rule.top_k, rule.top_p, rule.seed]
    return content_key(
        "prompts too",  # since their states are kept with the responses'
        [prompt.input_ids for prompt in prompts],
        backbone.weights_fingerprint(),
        [limits.max_new_tokens, sorted(limits.stop_ids), list(limits.stop_strings)],
        [str(backbone.model.dtype), attn_implementation],
        [metadata.version(name) for name in ("torch", "transformers")],
        *([draws] if rule.name == "sampling" else []),
    )


@torch.inference_mode()
def respond_to_prompts(
    prompts: list[Prompt], limits: Limits, backbone: Backbone, rule: AcceptanceRule = GREEDY
) -> list[HeldOutResponse]:
    """Let the backbone answer, greedily or by draws of the rule's seed."""
    if not prompts:
        return []
    asked = [prompt.input_ids for prompt in prompts]
    responses = []
    for ids, response in zip(asked, decode_plain(backbone, asked, limits, rule), strict=True):
        whole_1T = torch.tensor([ids + response.tokens], device=backbone.device)
        hidden_TD = backbone.hidden_states(whole_1T)[0, :-1]
        responses.append(HeldOutResponse(whole_1T[0, len(ids) :], hidden_TD))
    return responses


def _is_whole(path: Path) -> bool:
    """Is the file there, and not damaged since?"""
    if not path.is_file():
        return False
    try:
        with safe_open(path, "pt") as file:
            return set(file.keys()) == {"tokens", "hidden", "lengths"}
    except (OSError, SafetensorError):
        return False


def _as_tensors(responses: list[HeldOutResponse]) -> dict[str, Tensor]:
    return {
        "tokens": torch.cat([response.tokens_P for response in responses]).cpu(),
        "hidden": torch.cat([response.hidden_TD for response in responses]).cpu(),
        "lengths": torch.tensor([[len(r.tokens_P), len(r.hidden_TD)] for r in responses]),
    }


def _from_tensors(tensors: dict[str, Tensor]) -> list[HeldOutResponse]:
    of_responses, of_both = tensors["lengths"].T.tolist()
    pairs = zip(
        tensors["tokens"].split(of_responses), tensors["hidden"].split(of_both), strict=True
    )
    return [HeldOutResponse(tokens_P, hidden_TD) for tokens_P, hidden_TD in pairs]
