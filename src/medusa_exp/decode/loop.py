"""Greedy decoding of one prompt: plain, and with a tree of guesses. Twins, side by side.

N tree nodes, D hidden, V vocabulary.
"""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from medusa_exp.decode.attention import StepMask
from medusa_exp.decode.cache import TreeCache
from medusa_exp.decode.propose import Proposer
from medusa_exp.decode.verification import verify
from medusa_exp.errors import UserError
from medusa_exp.model.backbone import Backbone
from medusa_exp.tree import Tree, chain


@dataclass
class Decoded:
    """An answer: its tokens, a stop token included, and how they came about.

    One entry a backbone step in the two lists; the first step is the prompt's.
    """

    tokens: list[int] = field(default_factory=list)
    accept_lengths: list[int] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)


@torch.inference_mode()
def decode_plain(
    backbone: Backbone,
    prompt_ids: list[int],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    on_step: Callable[[list[int]], None] | None = None,
) -> Decoded:
    """Decode one token a step."""
    answer = _Answer(max_new_tokens, stop_ids, on_step)
    cache, mask = _prepare(backbone, prompt_ids, max_new_tokens, _SINGLE)
    token_1, _ = _prefill(backbone, prompt_ids, cache)
    answer.commit(token_1.tolist())
    while not answer.is_done:
        logits_1NV, _ = backbone.forward(token_1[None], cache, mask=mask.at(cache.length))
        token_1 = logits_1NV[:, -1].argmax(-1)
        answer.commit(token_1.tolist())
    return answer.decoded


@torch.inference_mode()
def decode_tree(
    backbone: Backbone,
    heads: nn.Module,
    tree: Tree,
    prompt_ids: list[int],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    rule: str = "greedy",
    on_step: Callable[[list[int]], None] | None = None,
) -> Decoded:
    """Decode one accepted path a step: the same tokens as `decode_plain`, in fewer steps.

    Each step checks a tree whose root is the token that is certain but not yet in the cache.
    """
    answer = _Answer(max_new_tokens, stop_ids, on_step)
    cache, mask = _prepare(backbone, prompt_ids, max_new_tokens, tree)
    propose = Proposer(heads, tree, backbone.device)
    parents_1N = torch.tensor([tree.parents], device=backbone.device)
    # Near the model's last position, guesses beyond it are clamped: none of them can be accepted.
    depths_N = mask.depths_N
    last_position = backbone.max_length - 1
    token_1, hidden_1D = _prefill(backbone, prompt_ids, cache)
    answer.commit(token_1.tolist())
    while not answer.is_done:
        start = cache.length
        tokens_1N = propose(token_1, hidden_1D)
        logits_1NV, hidden_1ND = backbone.forward(
            tokens_1N,
            cache,
            mask=mask.at(start),
            position_ids_BN=(start + depths_N).clamp(max=last_position)[None],
        )
        verdict = verify(logits_1NV, tokens_1N, parents_1N, rule=rule, max_depth=tree.depth)
        path = [node for node in verdict.path_BL[0].tolist() if node >= 0]
        cache.commit(start, path)
        token_1, hidden_1D = verdict.next_token_B, hidden_1ND[:, path[-1]]
        answer.commit([*tokens_1N[0, path[1:]].tolist(), token_1.item()])
    return answer.decoded


_SINGLE = chain(0)


class _Answer:
    """Collects tokens up to a stop token or the limit, wherever in an accepted run that falls."""

    def __init__(
        self,
        max_new_tokens: int,
        stop_ids: Collection[int],
        on_step: Callable[[list[int]], None] | None,
    ) -> None:
        self.decoded = Decoded()
        self.is_done = max_new_tokens <= 0
        self._max_new_tokens = max_new_tokens
        self._stop_ids = frozenset(stop_ids)
        self._on_step = on_step
        self._clock = time.perf_counter()

    def commit(self, tokens: list[int]) -> None:
        if self.is_done:
            return
        tokens = tokens[: self._max_new_tokens - len(self.decoded.tokens)]
        stop = next((i for i, token in enumerate(tokens) if token in self._stop_ids), None)
        if stop is not None:
            tokens = tokens[: stop + 1]
        self.decoded.tokens.extend(tokens)
        self.is_done = stop is not None or len(self.decoded.tokens) == self._max_new_tokens
        now = time.perf_counter()
        self.decoded.accept_lengths.append(len(tokens))
        self.decoded.step_seconds.append(now - self._clock)
        self._clock = now
        if self._on_step:
            self._on_step(tokens)


def _prepare(
    backbone: Backbone, prompt_ids: list[int], max_new_tokens: int, tree: Tree
) -> tuple[TreeCache, StepMask]:
    if not prompt_ids:
        raise UserError("the prompt has no token: there is nothing to continue.")
    length = len(prompt_ids) + max_new_tokens
    if length > backbone.max_length:
        raise UserError(
            f"a prompt of {len(prompt_ids)} tokens and {max_new_tokens} new ones make {length}; "
            f"the model has {backbone.max_length} positions. Lower decode.max_new_tokens."
        )
    capacity = length + len(tree)
    config = backbone.model.config.get_text_config()
    mask = StepMask(backbone.model, tree.mask, np.asarray(tree.depths), capacity)
    return TreeCache(config.num_hidden_layers, capacity), mask


def _prefill(backbone: Backbone, prompt_ids: list[int], cache: TreeCache) -> tuple[Tensor, Tensor]:
    """Run the prompt; return its next token [1] and its last hidden state [1, D]."""
    ids_1T = torch.tensor([prompt_ids], device=backbone.device)
    logits_11V, hidden_1TD = backbone.forward(ids_1T, cache, last_only=True)
    return logits_11V[:, -1].argmax(-1), hidden_1TD[:, -1]
