"""How many tokens a step decoding would give with the heads of this moment.

The backbone answers held-out prompts once, before the training. A validation then looks up which
guess of each head came true at each place of these answers, and replays decoding from that
(`tree/search.py`). Loss says how surprised heads are everywhere; this, what they are worth.

P positions of an answer, T of prompt and answer but the last, D hidden, K heads.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from medusa_exp.config import Config
from medusa_exp.data.prompts import Prompt
from medusa_exp.decode.loop import decode_plain
from medusa_exp.decode.settings import limits_of
from medusa_exp.model.backbone import Backbone
from medusa_exp.model.heads import MedusaHeads, heads_input
from medusa_exp.model.scoring import answer_ranks
from medusa_exp.runs.files import content_key, publish
from medusa_exp.tree.search import best_tree, num_steps
from medusa_exp.tree.tree import chain

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeldOutResponse:
    """An answer of the backbone's."""

    tokens_P: Tensor
    hidden_TD: Tensor
    """Of prompt and answer; each token of the answer was said from one of the last P."""


def held_out_responses(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    ends: Backbone,
    body: Callable[[], Backbone],
) -> list[HeldOutResponse]:
    """Return the backbone's answers to held-out prompts, from the cache where it has them.

    Args:
        config: what ends an answer.
        tokenizer: of the prompts.
        prompts: what is to be answered.
        ends: the backbone, perhaps without its layers.
        body: loads it with them.
    """
    if not prompts:
        return []
    path = _path(config, tokenizer, prompts, ends)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.stem}.lock")):
        kept = _load(path, ends.device)
        if kept is None:
            answered = respond_to_prompts(config, tokenizer, prompts, body())
            with publish(path) as partial:
                save_file(_as_tensors(answered), partial)
            kept = load_file(path, device=str(ends.device))
    return _from_tensors(kept)


def accept_lengths(
    heads: MedusaHeads, answers: Sequence[HeldOutResponse], num_nodes: int, max_rank: int
) -> tuple[float, float]:
    """Return the tokens per step of the best tree of so many nodes, and of the chain.

    Prompts' steps are counted, as in eval/tokens_per_step.
    """
    ranks = [response_ranks(heads, answer, max_rank) for answer in answers]
    num_tokens = sum(len(ranks_PK) for ranks_PK in ranks)
    tree = best_tree(ranks, num_nodes, max_rank)
    return num_tokens / num_steps(ranks, tree), num_tokens / num_steps(
        ranks, chain(heads.num_heads)
    )


@torch.no_grad()
def response_ranks(heads: MedusaHeads, answer: HeldOutResponse, max_rank: int) -> np.ndarray:
    """Return `model.ranks.answer_ranks` of an answer: ranks_PK."""
    read_TD = heads_input(heads.prefix, answer.hidden_TD[None])[0]
    tokens_P = answer.tokens_P
    return answer_ranks(heads, tokens_P, read_TD[len(read_TD) - len(tokens_P) :], max_rank)


def _path(
    config: Config, tokenizer: PreTrainedTokenizerBase, prompts: list[Prompt], backbone: Backbone
) -> Path:
    limits = limits_of(config, backbone, tokenizer)
    key = content_key(
        "prompts too",  # since their states are kept with the answers'
        [prompt.input_ids for prompt in prompts],
        backbone.weights_fingerprint(),
        [limits.max_new_tokens, sorted(limits.stop_ids), list(limits.stop_strings)],
        [str(backbone.model.dtype), config.model.attn_implementation],
        [metadata.version(name) for name in ("torch", "transformers")],
    )
    return Path(config.cache_dir) / "continuations" / f"{key}.safetensors"


@torch.inference_mode()
def respond_to_prompts(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    backbone: Backbone,
) -> list[HeldOutResponse]:
    """Let the backbone answer, greedily."""
    if not prompts:
        return []
    limits = limits_of(config, backbone, tokenizer)
    asked = [prompt.input_ids for prompt in prompts]
    answers = []
    for ids, answer in zip(asked, decode_plain(backbone, asked, limits), strict=True):
        whole_1T = torch.tensor([ids + answer.tokens], device=backbone.device)
        hidden_TD = backbone.hidden_states(whole_1T)[0, :-1]
        answers.append(HeldOutResponse(whole_1T[0, len(ids) :], hidden_TD))
    return answers


def _load(path: Path, device: torch.device) -> dict[str, Tensor] | None:
    """Return what the file holds; None where there is none, or it has been damaged since."""
    try:
        return load_file(path, device=str(device))
    except FileNotFoundError:
        return None
    except SafetensorError as error:
        log.warning("%s is damaged (%s), and is made anew", path, error)
        return None


def _as_tensors(answers: list[HeldOutResponse]) -> dict[str, Tensor]:
    return {
        "tokens": torch.cat([answer.tokens_P for answer in answers]).cpu(),
        "hidden": torch.cat([answer.hidden_TD for answer in answers]).cpu(),
        "lengths": torch.tensor([[len(a.tokens_P), len(a.hidden_TD)] for a in answers]),
    }


def _from_tensors(tensors: dict[str, Tensor]) -> list[HeldOutResponse]:
    of_answers, of_both = tensors["lengths"].T.tolist()
    pairs = zip(tensors["tokens"].split(of_answers), tensors["hidden"].split(of_both), strict=True)
    return [HeldOutResponse(tokens_P, hidden_TD) for tokens_P, hidden_TD in pairs]
