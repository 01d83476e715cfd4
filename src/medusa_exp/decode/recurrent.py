"""Chains of draft tokens for models with recurrent layers: Mamba, gated delta rules, convolutions.

A recurrent state holds all tokens so far in one tensor: those that were rejected cannot be cut off
again, as they can in a KV cache, and the branches of a tree would all have to share it. So drafts
are chains, and a step begins where the state is sure: it runs the tokens that were accepted since,
then the new draft. In every recurrent layer tokens pass one after the other, through the very code
by which the model decodes plainly, and the state behind the accepted ones is kept; all other layers
see the whole step at once. Behind a draft that was accepted whole, the state at its end is sure.

It is one pass of the model a step, by up to K + 1 tokens wider than a chain of K in a model of
attention alone. Rows of a batch are decoded one by one.

N tokens of a step (the pending ones, the root and K draft tokens), D hidden, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

from medusa_exp.decode.drafting import Drafter
from medusa_exp.decode.lookup import Found
from medusa_exp.decode.rule import AcceptanceRule, Verifier
from medusa_exp.decode.step import (
    Observer,
    at_end,
    outcome_of,
    roots_of,
    tokens_of,
    verdict_on,
)
from medusa_exp.errors import UserError
from medusa_exp.model.backbone import Backbone
from medusa_exp.tree import Tree

_MIXERS: WeakKeyDictionary[PreTrainedModel, dict[nn.Module, int]] = WeakKeyDictionary()


def is_recurrent(backbone: Backbone) -> bool:
    """Does the model have layers that keep a state in place of keys and values?"""
    return has_recurrent_layers(backbone.model.config)


def has_recurrent_layers(config: PretrainedConfig) -> bool:
    """Say the same of a model that need not be loaded yet."""
    layers = DynamicCache(config=config).layers
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)


def check_chain(name: str, tree: Tree) -> None:
    """Raise a UserError where a model with recurrent layers would have to check a branch."""
    if tree.num_lookup:
        raise UserError(
            f"{name} has recurrent layers, whose state cannot hold a looked-up branch beside the "
            "heads' chain: set tree.lookup=0."
        )
    if tree.num_picked is not None or list(tree.parents) != list(range(-1, len(tree) - 1)):
        raise UserError(
            f"{name} has recurrent layers, whose state cannot hold the branches of a tree: it "
            "takes chains of draft tokens. Set tree=chain or tree=calibrated."
        )


def check_prefix(name: str, has_prefix: bool) -> None:
    """Raise a UserError where heads would add a layer of attention to such a model."""
    if has_prefix:
        raise UserError(
            f"{name} has recurrent layers, whose cache has no room for a layer of the heads: set "
            "head.prefix_attention=false, and train again what has been trained with it."
        )


class StateCache(DynamicCache):
    """Keys, values and states of one row; what a step adds for nothing can be taken back."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(config=model.config)
        for place, layer in enumerate(self.layers):
            if type(layer) is DynamicSlidingWindowLayer:  # which forgets what a step pushes out
                self.layers[place] = DynamicLayer()
        self.lengths = [0]
        """Tokens in the cache, in the form of `GrowingCache`."""

    def set_lengths(self, lengths: list[int]) -> None:
        """Say how many tokens the cache holds."""
        self.lengths = lengths

    def cut(self, length: int, states: dict[int, list[Tensor]]) -> None:
        """Keep the first tokens alone: their keys and values, and these states behind them."""
        for place, layer in enumerate(self.layers):
            if getattr(layer, "keys", None) is not None and layer.keys.numel():
                layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]
            if place in states:
                for now, then in zip(states_of(layer), states[place], strict=True):
                    now.copy_(then)
        self.lengths = [length]


def states_of(layer: Any) -> list[Tensor]:
    """Return the tensors of a recurrent layer's state, in an order of their own."""
    tables = (layer.conv_states, layer.recurrent_states)
    return [state for table in tables for _, state in sorted(table.items()) if state is not None]


def mixers_of(backbone: Backbone) -> dict[nn.Module, int]:
    """Return the modules that read and write recurrent states, with the numbers of their layers.

    Found by running a few tokens and seeing which module is at work when a state is written: every
    family has names of its own.
    """
    model = backbone.model
    if model in _MIXERS:
        return _MIXERS[model]
    found: dict[nn.Module, int] = {}
    running: list[nn.Module] = []

    class Recording(StateCache):
        def update_conv_state(
            self, states: Tensor, layer_idx: int, *more: Any, **named: Any
        ) -> Any:
            found[running[-1]] = layer_idx
            return super().update_conv_state(states, layer_idx, *more, **named)

        def update_recurrent_state(
            self, states: Tensor, layer_idx: int, *more: Any, **named: Any
        ) -> Any:
            found[running[-1]] = layer_idx
            return super().update_recurrent_state(states, layer_idx, *more, **named)

    handles = []
    for module in backbone.body.modules():
        handles.append(module.register_forward_pre_hook(lambda one, _: running.append(one)))
        handles.append(module.register_forward_hook(lambda *_: (running.pop(), None)[1]))
    try:
        with torch.inference_mode():
            ids_1N = torch.zeros(1, 2, dtype=torch.long, device=backbone.device)
            backbone.forward(ids_1N, Recording(model))
    finally:
        for handle in handles:
            handle.remove()
    _MIXERS[model] = found
    return found


@contextmanager
def one_by_one(
    backbone: Backbone, cache: StateCache, kept: int
) -> Iterator[dict[int, list[Tensor]]]:
    """Let recurrent layers take tokens one after the other; yield their states behind `kept`."""
    states: dict[int, list[Tensor]] = {}
    mixers = mixers_of(backbone)
    before = {mixer: mixer.__dict__.get("forward") for mixer in mixers}
    for mixer, place in mixers.items():
        mixer.forward = _token_by_token(mixer.forward, cache.layers[place], place, kept, states)
    try:
        yield states
    finally:
        for mixer, forward in before.items():
            del mixer.forward
            if forward is not None:
                mixer.forward = forward


def _token_by_token(
    forward: Callable[..., Any], layer: Any, place: int, kept: int, states: dict[int, list[Tensor]]
) -> Callable[..., Any]:
    def run(*inputs: Any, **named: Any) -> Any:
        whole = inputs[0] if inputs else named["hidden_states"]
        outputs = []
        for token in range(whole.shape[1]):
            if token == kept:
                states[place] = [state.clone() for state in states_of(layer)]
            part = slice(token, token + 1)
            cut = [_part(value, part, whole.shape[1]) for value in inputs]
            cut_named = {
                name: None if "mask" in name else _part(value, part, whole.shape[1])
                for name, value in named.items()
            }
            outputs.append(forward(*cut, **cut_named))
        if isinstance(outputs[0], tuple):
            return torch.cat([output[0] for output in outputs], 1), *outputs[-1][1:]
        return torch.cat(outputs, 1)

    return run


def _part(value: Any, part: slice, length: int) -> Any:
    """Return one token's part of what has a place for each."""
    if isinstance(value, tuple):
        return tuple(_part(one, part, length) for one in value)
    is_by_token = isinstance(value, Tensor) and value.ndim > 1 and value.shape[1] == length
    return value[:, part] if is_by_token else value


class ChainStep:
    """One step for a row of a model with recurrent layers; see `decode.step.Step`."""

    is_at_work = False

    def __init__(
        self,
        backbone: Backbone,
        drafter: Drafter,
        rule: AcceptanceRule,
        observer: Observer,
    ) -> None:
        self.backbone, self.drafter, self.observer = backbone, drafter, observer
        self.verifier = Verifier(rule, backbone.device)
        self.found = Found(drafter, 1, backbone.device)
        self.cache = StateCache(backbone.model)
        self._pending: list[int] = []
        """Tokens that were accepted, and that the state does not hold yet."""

    def begin(self, root_B: Tensor, hidden_BD: Tensor, last: int) -> None:
        self.root_B, self.hidden_BD, self.last = root_B, hidden_BD, last
        self.active = list(range(len(root_B)))
        self._pending = []

    def start(self) -> None:
        """Do nothing: a step needs the host within."""

    def finish(self) -> list[list[int]]:
        part, cache, pending = self.observer.part, self.cache, self._pending
        # 1. Draft
        with part("heads"):
            uniforms_BU = self.verifier.draw(len(self.root_B), self.drafter.num_uniforms)
            draft = self.drafter(self.root_B, self.hidden_BD, uniforms_BU)
        # 2. Forward
        start, kept = cache.lengths[0], len(pending)
        ids_1N = torch.cat([self.root_B.new_tensor([pending]), draft.tokens_BN], 1)
        positions_1N = torch.arange(start, start + ids_1N.shape[1], device=ids_1N.device)[None]
        with part("backbone"), one_by_one(self.backbone, cache, kept) as states:
            logits_1NV, hidden_1ND = self.backbone.forward(
                ids_1N, cache, position_ids_BN=positions_1N.clamp(max=self.last)
            )
        # 3. Verify
        with part("verification"):
            verdict = verdict_on(draft, logits_1NV[:, kept:], self.verifier, uniforms_BU)
        # 4. Commit
        rows = outcome_of(draft, verdict).tolist()
        [tokens], [root] = tokens_of(rows), roots_of(rows)
        # The root was read above: kernels wrote this verdict where root_B lay.
        self.root_B, self.hidden_BD = verdict.next_token_B, at_end(hidden_1ND[:, kept:], verdict)
        with part("cache"):
            if len(tokens) == draft.tokens_BN.shape[1]:  # all of the draft, and the token after it
                cache.set_lengths([start + ids_1N.shape[1]])
                self._pending = []
            else:
                cache.cut(start + kept, states)
                self._pending = [root, *tokens[:-1]]
        return [tokens]

    def keep_rows(self, places: list[int]) -> None:
        self.activate([self.active[place] for place in places])

    def activate(self, rows: list[int]) -> None:
        self.active = rows
