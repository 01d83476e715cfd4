"""Decoding a batch of prompts: plain, and with trees of guesses. Twins, side by side.

Each is a generator of steps, so that tokens can be shown as they come; `decode_plain` and
`decode_tree` run it to its end. The rows of a batch have prompts of any lengths and end when they
end; the work of a step shrinks with them.

B rows, T prompt tokens, N tree nodes, D hidden, V vocabulary.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from medusa_exp.decode.answers import Answers, Decoded, Limits
from medusa_exp.decode.attention import StepMask
from medusa_exp.decode.cache import TreeCache
from medusa_exp.decode.propose import Proposer, build_proposer
from medusa_exp.decode.rule import Judge, Rule
from medusa_exp.errors import UserError
from medusa_exp.model.backbone import Backbone
from medusa_exp.tree import Tree

GREEDY = Rule()
_PREFILL_TOKENS = 4096
"""Prompt tokens of a batch that are run at a time: bounds the memory of activations."""


def decode_plain(
    backbone: Backbone, prompts: list[list[int]], limits: Limits, rule: Rule = GREEDY
) -> list[Decoded]:
    """Decode one token a step and row; see `plain_steps`."""
    answers = Answers(len(prompts), limits)
    for _ in plain_steps(backbone, prompts, answers, rule):
        pass
    return answers.decoded


def decode_tree(
    backbone: Backbone,
    heads: nn.Module,
    tree: Tree,
    prompts: list[list[int]],
    limits: Limits,
    rule: Rule = GREEDY,
) -> list[Decoded]:
    """Decode one accepted path a step and row; see `tree_steps`."""
    answers = Answers(len(prompts), limits)
    proposer = build_proposer(heads, tree, backbone.device)
    for _ in tree_steps(backbone, proposer, prompts, answers, rule):
        pass
    return answers.decoded


@torch.inference_mode()
def plain_steps(
    backbone: Backbone, prompts: list[list[int]], answers: Answers, rule: Rule = GREEDY
) -> Iterator[list[list[int]]]:
    """Yield the tokens that each step adds to each row.

    Raises:
        UserError: a prompt is empty, or leaves no room for an answer.
    """
    cache, mask, last = _prepare(backbone, prompts, answers.limits, num_nodes=1)
    judge = Judge(rule, backbone.device)
    one_111 = torch.ones(1, 1, 1, dtype=torch.bool, device=backbone.device)
    depth_11 = torch.zeros(1, 1, dtype=torch.long, device=backbone.device)
    logits_B1V, _ = _prefill(backbone, prompts, cache)
    while answers.active:
        token_B = judge.next_token(logits_B1V)
        yield answers.commit([[token] for token in token_B.tolist()])
        [token_B] = _drop_ended(answers, cache, token_B)
        if answers.active:
            logits_B1V, _ = backbone.forward(
                token_B[:, None],
                cache,
                mask=mask.at(cache.lengths, one_111, depth_11),
                position_ids_BN=_positions(cache, depth_11, last),
            )
            cache.commit([[0]] * len(token_B))


@torch.inference_mode()
def tree_steps(
    backbone: Backbone,
    propose: Proposer,
    prompts: list[list[int]],
    answers: Answers,
    rule: Rule = GREEDY,
) -> Iterator[list[list[int]]]:
    """Yield the tokens that each step adds to each row: as `plain_steps`, in fewer steps.

    With the rules greedy and sampling what comes out is the same, or has the same law. Each step
    checks a tree whose root is the token that is certain but not yet in the cache.

    Raises:
        UserError: as `plain_steps`.
    """
    cache, mask, last = _prepare(backbone, prompts, answers.limits, propose.num_nodes)
    judge = Judge(rule, backbone.device)
    logits_B1V, hidden_BD = _prefill(backbone, prompts, cache)
    if not answers.active:
        return
    root_B = judge.next_token(logits_B1V)
    yield answers.commit([[token] for token in root_B.tolist()])
    root_B, hidden_BD = _drop_ended(answers, cache, root_B, hidden_BD)
    while answers.active:
        draft = propose(root_B, hidden_BD)
        logits_BNV, hidden_BND = backbone.forward(
            draft.tokens_BN,
            cache,
            mask=mask.at(cache.lengths, draft.ancestors_BNN, draft.depths_BN),
            position_ids_BN=_positions(cache, draft.depths_BN, last),
        )
        verdict = judge(logits_BNV, draft.tokens_BN, draft.parents_BN, propose.depth, draft.nodes)
        path_BL, root_B = verdict.path_BL, verdict.next_token_B
        last_B1 = path_BL.gather(1, verdict.num_accepted_B[:, None])
        hidden_BD = hidden_BND.gather(1, last_B1[..., None].expand(-1, 1, hidden_BND.shape[2]))[
            :, 0
        ]
        said_BL = draft.tokens_BN.gather(1, path_BL.clamp(min=0))
        # The step's one wait for the device.
        outcome = torch.cat([root_B[:, None], verdict.num_accepted_B[:, None], path_BL, said_BL], 1)
        said, paths = _read(outcome.tolist(), path_BL.shape[1])
        cache.commit(paths)
        yield answers.commit(said)
        root_B, hidden_BD = _drop_ended(answers, cache, root_B, hidden_BD)


def _read(outcome: list[list[int]], width: int) -> tuple[list[list[int]], list[list[int]]]:
    """Return each row's tokens, and its path, of [next token, accepted, path, tokens on it]."""
    said, paths = [], []
    for next_token, accepted, *rest in outcome:
        paths.append(rest[: accepted + 1])
        said.append([*rest[width + 1 : width + 1 + accepted], next_token])
    return said, paths


def _prepare(
    backbone: Backbone, prompts: list[list[int]], limits: Limits, num_nodes: int
) -> tuple[TreeCache, StepMask, int]:
    """Return a cache, masks for it, and the last position there is for these prompts."""
    longest = max(map(len, prompts))
    if not min(map(len, prompts)):
        raise UserError("the prompt has no token: there is nothing to continue.")
    length = longest + limits.max_new_tokens
    limit = min(backbone.max_length_from(len(prompt)) for prompt in prompts)
    if length > limit:
        raise UserError(
            f"a prompt of {longest} tokens and {limits.max_new_tokens} new ones make {length}; "
            f"the model has {limit} positions for it. Lower decode.max_new_tokens."
        )
    num_layers = backbone.model.config.get_text_config().num_hidden_layers
    capacity = length + num_nodes
    cache = TreeCache(num_layers, capacity, len(prompts))
    return cache, StepMask(backbone.model, capacity), limit - 1


def _prefill(
    backbone: Backbone, prompts: list[list[int]], cache: TreeCache
) -> tuple[Tensor, Tensor]:
    """Run the prompts, some columns at a time; return logits_B1V and hidden_BD of their ends.

    Shorter prompts are padded on the right, where no token of theirs looks.
    """
    lengths = [len(prompt) for prompt in prompts]
    longest = max(lengths)
    ids_BT = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts])
    ids_BT = ids_BT.to(backbone.device)
    columns = max(1, _PREFILL_TOKENS // len(prompts))
    logits: list[Tensor] = [ids_BT] * len(prompts)
    hidden: list[Tensor] = [ids_BT] * len(prompts)
    for start in range(0, longest, columns):
        stop = min(start + columns, longest)
        ends = sorted({n - 1 - start for n in lengths if start < n <= stop}) or [0]
        keep = torch.tensor(ends, device=backbone.device)
        logits_BEV, hidden_BED = backbone.forward(ids_BT[:, start:stop], cache, keep=keep)
        for row, length in enumerate(lengths):
            if start < length <= stop:
                place = ends.index(length - 1 - start)
                logits[row], hidden[row] = logits_BEV[row, place], hidden_BED[row, place]
    cache.set_lengths(lengths)
    return torch.stack(logits)[:, None], torch.stack(hidden)


def _positions(cache: TreeCache, depths_BN: Tensor, last: int) -> Tensor:
    """Guesses beyond the last position are clamped: none of them can be accepted."""
    lengths_B1 = torch.tensor(cache.lengths, device=depths_BN.device)[:, None]
    return (lengths_B1 + depths_BN).clamp(max=last)


def _drop_ended(answers: Answers, cache: TreeCache, *values: Tensor) -> list[Tensor]:
    """Drop the rows whose answers have ended from the cache and from tensors [B, ...]."""
    keep = answers.kept
    if len(keep) == len(cache.lengths) or not keep:
        return list(values)
    cache.keep_rows(keep)
    index = torch.tensor(keep, device=values[0].device)
    return [value[index] for value in values]
