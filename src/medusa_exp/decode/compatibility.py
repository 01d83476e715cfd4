"""Check that a model supports tree attention: a 4-D mask and positions of our own.

Of one with recurrent layers, which takes chains alone: that rejected tokens leave no trace.

N tree nodes, T tokens, V vocabulary.
"""

from weakref import WeakSet

import torch
from torch import Tensor
from transformers import PreTrainedModel

from medusa_exp.decode.cache import GrowingCache
from medusa_exp.decode.masks import StepMask
from medusa_exp.decode.recurrent import StateCache, is_recurrent, one_by_one
from medusa_exp.errors import UserError
from medusa_exp.model.backbone import Backbone
from medusa_exp.tree import Tree, chain

_PROMPT = [1, 2, 3]
_TOKENS = [4, 5, 6, 7, 5]
_TREE = Tree((-1, 0, 0, 1, 2), (-1, 0, 1, 0, 0))
_PATH = [0, 2, 4]
"""What is accepted of the tree. Neither draft token stands where a plain token would: a model that
takes the place in the call for the position, or sees all that is before it, is found out."""
_NEXT = 6
_TOLERANCE = {torch.float32: 0.02, torch.float64: 0.02}
"""Largest difference, in spreads of the logits: a wrong mask moves them by about a whole one."""
_HALF_TOLERANCE = 0.25
"""The same for the half types, which round more away."""
_PASSED: WeakSet[PreTrainedModel] = WeakSet()
"""Models that have been checked."""


@torch.inference_mode()
def check_tree_attention(backbone: Backbone) -> None:
    """Check a small tree with a branch, and the step after it, against plain forward calls.

    With recurrent layers a chain takes the tree's place.

    Whether an architecture obeys a mask and positions of our own cannot be seen from its config:
    some ignore them silently. Done once for each model.

    Raises:
        UserError: this model ignores or refuses them.
    """
    if backbone.model in _PASSED:
        return
    recurrent = is_recurrent(backbone)
    what = "chains" if recurrent else "trees"
    config = backbone.model.config.get_text_config()
    if "local" in (getattr(config, "attention_layers", None) or ()):
        raise UserError(f"{backbone.name} has windows that count rows of the cache, not positions.")
    try:
        found_2V = _by_chain(backbone) if recurrent else _by_tree(backbone)
        expected_2V = _plainly(backbone)
    except UserError:
        raise
    except Exception as error:  # of whatever the model's own code does with what it does not know
        raise UserError(
            f"{backbone.name} cannot be decoded with {what}: it refuses an attention mask or a "
            f"cache of our own ({type(error).__name__}: {str(error)[:200]})."
        ) from error
    tolerance = _TOLERANCE.get(backbone.model.dtype, _HALF_TOLERANCE)
    difference = (found_2V - expected_2V).abs().max()
    if not difference <= tolerance * expected_2V.std() + 1e-6:
        raise UserError(
            f"{backbone.name} cannot be decoded with {what}: it does not heed an attention mask, "
            f"positions or a state of our own (its logits are off by {difference:.3g})."
        )
    _PASSED.add(backbone.model)


def _by_chain(backbone: Backbone) -> Tensor:
    """Return logits_2V after the path's last token and the next, with a rejected draft between."""
    device, rows, path = backbone.device, backbone.vocab_size, [_TOKENS[node] for node in _PATH]
    cache = StateCache(backbone.model)

    def run(tokens: list[int], kept: int) -> tuple[Tensor, dict[int, list[Tensor]]]:
        start = cache.lengths[0]
        positions_1N = torch.arange(start, start + len(tokens), device=device)[None]
        with one_by_one(backbone, cache, kept) as states:
            logits_1NV, _ = backbone.forward(
                torch.tensor([tokens], device=device) % rows, cache, position_ids_BN=positions_1N
            )
        return logits_1NV[0].float(), states

    backbone.forward(torch.tensor([_PROMPT], device=device) % rows, cache)
    cache.set_lengths([len(_PROMPT)])
    # Of this draft all but the first two tokens are rejected.
    _, states = run([*path[:2], *reversed(_TOKENS)], 2)
    cache.cut(len(_PROMPT) + 2, states)
    logits_NV, _ = run([*path[2:], _NEXT], 0)
    return logits_NV[-2:]


def _by_tree(backbone: Backbone) -> Tensor:
    """Return logits_2V after the path's last node, and after the token that follows the path."""
    device, rows = backbone.device, backbone.vocab_size
    capacity = len(_PROMPT) + len(_TOKENS) + 1
    cache, mask = GrowingCache(backbone.num_layers, capacity, 1), StepMask(backbone.model, capacity)
    backbone.forward(torch.tensor([_PROMPT], device=device) % rows, cache)
    cache.set_lengths([len(_PROMPT)])
    first_V = _step(backbone, cache, mask, _TOKENS, _TREE)[_PATH[-1]]
    cache.commit([_PATH])
    return torch.stack([first_V, _step(backbone, cache, mask, [_NEXT], chain(0))[0]])


def _step(
    backbone: Backbone, cache: GrowingCache, mask: StepMask, tokens: list[int], tree: Tree
) -> Tensor:
    """Return logits_NV after each of the tree's tokens."""
    device = backbone.device
    ancestors_1NN = torch.from_numpy(tree.mask).to(device)[None]
    depths_1N = torch.from_numpy(tree.depths).to(device)[None]
    logits_1NV, _ = backbone.forward(
        torch.tensor([tokens], device=device) % backbone.vocab_size,
        cache,
        mask=mask.at(cache.lengths, ancestors_1NN, depths_1N),
        position_ids_BN=depths_1N + cache.lengths[0],
    )
    return logits_1NV[0].float()


def _plainly(backbone: Backbone) -> Tensor:
    """Return the same logits_2V by one call on the tokens of the path, without a cache."""
    tokens = [*_PROMPT, *(_TOKENS[node] for node in _PATH), _NEXT]
    ids_1T = torch.tensor([tokens], device=backbone.device) % backbone.vocab_size
    return backbone.model(input_ids=ids_1T, use_cache=False).logits[0, -2:].float()
