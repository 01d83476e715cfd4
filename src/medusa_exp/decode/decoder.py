"""The decoder: a model, its heads and a draft tree, ready to generate.

`Decoder` owns what decoding keeps from prompt to prompt: the stacked heads, the drafter of each
tree, the backbone as heads with prefix attention see it, and the captured steps.

B rows, T prompt tokens, N tokens of one forward, D hidden, V vocabulary.
"""

import importlib
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from medusa_exp.decode.captured_steps import CapturedSteps
from medusa_exp.decode.compatibility import check_tree_attention
from medusa_exp.decode.compiled import CompiledLayers
from medusa_exp.decode.detokenizer import IncrementalDetokenizer
from medusa_exp.decode.drafting import Drafter, build_drafter, key_of_rule, root_only
from medusa_exp.decode.lookup import LookupDrafter, check_draft
from medusa_exp.decode.loop import (
    Limits,
    Response,
    Responses,
    find_room,
    plain_steps,
    tree_steps,
)
from medusa_exp.decode.memory import slots_with_room
from medusa_exp.decode.prefixed import PrefixedBackbone
from medusa_exp.decode.prompt_ids import Prompt, Prompts, ids_of_each, ids_of_one
from medusa_exp.decode.recurrent import ChainStep, check_chain, check_prefix, is_recurrent
from medusa_exp.decode.rule import GREEDY, AcceptanceRule
from medusa_exp.decode.slot_steps import CapturedSlots, EagerSlots
from medusa_exp.decode.slots import OneByOne, Slots
from medusa_exp.decode.step import UNOBSERVED, EagerStep, Observer, Step
from medusa_exp.errors import UserError
from medusa_exp.model.backbone import Backbone
from medusa_exp.model.heads import MedusaHeads, stack_heads
from medusa_exp.tree import Tree

_NEW_TOKENS = 128
"""Default limit of new tokens."""


@dataclass
class Generation:
    """What `generate` returns."""

    sequences: list[list[int]]
    """The new tokens of each row, a stop token included."""
    accept_lengths: list[list[int]]
    """Tokens committed at each step of each row; a row's sum is its length."""
    num_steps: int
    """Backbone steps of the batch: those of the row that took most."""


OnStep = Callable[[list[list[int]]], None]
"""Is told the tokens that a step adds to each row: none, for a row that has ended. What it raises
ends the decoding."""


@dataclass
class StreamedStep:
    """What one step adds to a response."""

    text: str
    """Empty without a tokenizer; half of a character comes with the next step."""
    tokens: list[int]

    @property
    def num_tokens(self) -> int:
        """Tokens that the step committed."""
        return len(self.tokens)


class Decoder:
    """Decodes prompts over a draft tree, or plainly, with one model and its heads.

    Args:
        model: a causal language model of transformers, in evaluation mode, or a `Backbone`.
        heads: any module with `heads(hidden_BD) -> logits_BKV`; without them only plain decoding.
        tree: the draft tokens that a step checks; not deeper than there are heads. Methods that
            decode over a tree take another one as `tree=`.
        rule: which draft tokens are accepted.
        limits: where responses end; by default at the model's own stop tokens, or after 128 tokens.
        tokenizer: turns prompts of text into tokens, and for `stream` tokens into text.
        cuda_graph: take steps of fixed shapes, which on a GPU are captured as CUDA graphs. None
            does so where the whole model lies on one CUDA device.
        compiles: run the model's layers compiled: in steps of fixed shapes, which are then taken on
            a CPU too, plain ones included, and on prompts that run together in many slots. Not
            where the model is spread over devices.
        observer: is told of the parts of steps over trees.

    Raises:
        UserError: the model cannot be decoded with trees, because it ignores or refuses an
            attention mask or positions that are not its own. Asked once for each model. Or it is
            to be compiled on a CPU, and there is no C++ compiler.
    """

    def __init__(
        self,
        model: PreTrainedModel | Backbone,
        heads: nn.Module | None = None,
        tree: Tree | None = None,
        rule: AcceptanceRule = GREEDY,
        *,
        limits: Limits | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        cuda_graph: bool | None = None,
        compiles: bool = False,
        observer: Observer = UNOBSERVED,
    ) -> None:
        self.backbone = model if isinstance(model, Backbone) else Backbone(model)
        if heads is not None:
            check_tree_attention(self.backbone)
        if isinstance(heads, MedusaHeads):
            heads = stack_heads(heads, self.backbone)
        self.heads, self.tree, self.rule = heads, tree, rule
        self.limits = limits or Limits(_NEW_TOKENS, self.backbone.eos_token_ids)
        self.tokenizer, self.observer = tokenizer, observer
        can_capture = self.backbone.device.type == "cuda" and not self.backbone.is_spread
        self.is_recurrent = is_recurrent(self.backbone)
        self.compiles = compiles and not self.backbone.is_spread and not self.is_recurrent
        wanted = can_capture or self.compiles if cuda_graph is None else cuda_graph
        self.uses_fixed_shapes = wanted and not self.is_recurrent
        self.layers = CompiledLayers(self.backbone) if self.compiles else None
        prefix = getattr(heads, "prefix", None)
        if self.is_recurrent:
            check_prefix(self.backbone.name, prefix is not None)
        self._prefixed = PrefixedBackbone(self.backbone, prefix, observer) if prefix else None
        self._captured: dict[Backbone, CapturedSteps] = {}
        self._captured_slots: dict[Backbone, CapturedSlots] = {}
        self._drafters: dict[Hashable, Drafter] = {}

    @classmethod
    def from_run(
        cls, run: str | Path, *, device: str | None = None, trust_remote_code: bool = False
    ) -> "Decoder":
        """Load the model, heads, tree, acceptance rule and limits of a run directory.

        Args:
            run: directory of a run that has trained heads.
            device: as the key `device`; the run's own by default.
            trust_remote_code: run Python code that comes with the model, where the run did: a run
                directory, which others may have made, cannot decide that.

        Raises:
            UserError: there is no such run, or it lacks heads or a tree; or it asks for such code.
        """
        # By name, because the stages, which know how a run is opened, stand above this package.
        stages = importlib.import_module("medusa_exp.stages.session")
        decoder: Decoder = stages.Session.of_run(
            Path(run), device, trust_remote_code=trust_remote_code
        ).decoder()
        return decoder

    def observed(self, observer: Observer, *, cuda_graph: bool) -> "Decoder":
        """Return the same decoder with an observer, and with captured steps of its own."""
        return Decoder(
            self.backbone,
            self.heads,
            self.tree,
            self.rule,
            limits=self.limits,
            tokenizer=self.tokenizer,
            cuda_graph=cuda_graph,
            compiles=self.compiles,
            observer=observer,
        )

    def generate(
        self,
        input_ids: Prompts,
        *,
        attention_mask: Tensor | None = None,
        max_new_tokens: int | None = None,
        eos_token_id: int | list[int] | None = None,
        on_step: OnStep | None = None,
    ) -> Generation:
        """Continue prompts as the model alone would, in fewer steps.

        Args:
            input_ids: prompts [B, T]; or one prompt, or a list of them, each as for `stream`.
            attention_mask: [B, T], False or 0 at padding, left or right; an encoding has its own.
            max_new_tokens: at most so many a row; that of `limits` by default.
            eos_token_id: ids that end a row; those of `limits` by default.
            on_step: is called after each step with the tokens that it adds to each row.

        Raises:
            ValueError: the model is in training mode, where its dropout would change what it says;
                or an argument has no such value.
            UserError: a row is empty, longer than the model's positions, or no prompt.
        """
        if self.backbone.model.training:
            raise ValueError("the model is in training mode: call model.eval() first.")
        limits = self._limits(max_new_tokens, eos_token_id)
        prompts = input_ids
        if isinstance(input_ids, Tensor):
            prompts = _without_padding(input_ids, attention_mask, self.backbone.num_ids)
        elif attention_mask is not None:
            raise UserError(
                "attention_mask goes with input_ids as a tensor [B, T]: ask the tokenizer for "
                "return_tensors='pt', or pass what it returns whole."
            )
        responses = self.decode(prompts, limits, on_step=on_step)
        return Generation(
            [response.tokens for response in responses],
            [response.accept_lengths for response in responses],
            max(len(response.accept_lengths) for response in responses),
        )

    def _limits(self, max_new_tokens: int | None, eos_token_id: Any) -> Limits:
        """Return `limits` with what a caller asks for in place of its own."""
        limits = self.limits
        if max_new_tokens is not None:
            limits = replace(limits, max_new_tokens=max_new_tokens)
        if eos_token_id is not None:
            if isinstance(eos_token_id, str):  # whose letters would be taken one by one
                raise ValueError(
                    f"eos_token_id={eos_token_id!r} is text: give the id, "
                    "tokenizer.convert_tokens_to_ids(text)."
                )
            ids = [eos_token_id] if isinstance(eos_token_id, int) else eos_token_id
            limits = replace(limits, stop_ids=ids)
        most = limits.max_new_tokens
        if most != int(most) or most < 0:
            raise ValueError(f"max_new_tokens={most} must be 0 or more, and whole.")
        return limits

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int | None = None,
        eos_token_id: int | list[int] | None = None,
    ) -> Iterator[StreamedStep]:
        """Yield what each step adds to the response to one prompt: text, token ids, or an encoding.

        Text is tokenized as it is: no chat template is applied. For a chat, pass
        `tokenizer.apply_chat_template(messages, add_generation_prompt=True)`.

        Args:
            prompt: what is continued.
            max_new_tokens: at most so many; that of `limits` by default.
            eos_token_id: ids that end the response; those of `limits` by default.

        Raises:
            ValueError: an argument has no such value.
            UserError: the prompt is none of these, is text where there is no tokenizer, is empty,
                or leaves no room for a response.
        """
        limits = self._limits(max_new_tokens, eos_token_id)
        ids = ids_of_one(prompt, self.tokenizer, self.backbone.num_ids)
        detokenizer = IncrementalDetokenizer(self.tokenizer) if self.tokenizer else None
        for [added] in self.steps([ids], Responses(1, limits)):
            yield StreamedStep("" if detokenizer is None else detokenizer.add(added), added)

    def decode(
        self,
        prompts: Prompts,
        limits: Limits | None = None,
        *,
        tree: Tree | None = None,
        rule: AcceptanceRule | None = None,
        seed: int | None = None,
        on_step: OnStep | None = None,
    ) -> list[Response]:
        """Decode prompts over a tree, one accepted path per step for each row; see `steps`.

        Prompts are a list of what `stream` takes, or one such.
        """
        drafter = self.drafter(tree, rule)
        return self._decode(
            prompts,
            limits,
            lambda some, responses: self.steps(some, responses, drafter, rule, seed),
            on_step,
        )

    def decode_plain(
        self,
        prompts: Prompts,
        limits: Limits | None = None,
        *,
        rule: AcceptanceRule | None = None,
        seed: int | None = None,
    ) -> list[Response]:
        """Decode a batch of prompts without heads, one token per step for each row.

        With fixed shapes a step is that of a tree which is only a root, captured like any other.
        Prompts are as for `decode`, and `seed` is as for `steps`.
        """
        return self._decode(
            prompts,
            limits,
            lambda some, responses: self.plain_steps(some, responses, rule, seed),
        )

    def _decode(
        self,
        prompts: Prompts,
        limits: Limits | None,
        steps: Callable[[list[list[int]], Responses], Iterator[list[list[int]]]],
        on_step: OnStep | None = None,
    ) -> list[Response]:
        rows = ids_of_each(prompts, self.tokenizer, self.backbone.num_ids)
        found: dict[int, Response] = {}
        for places in self._batches(rows):
            responses = Responses(len(places), limits or self.limits)
            for added in steps([rows[place] for place in places], responses):
                if on_step is not None:
                    by_place = dict(zip(places, added, strict=True))
                    on_step([by_place.get(place, []) for place in range(len(rows))])
            found |= zip(places, responses.rows, strict=True)
        return [found[place] for place in range(len(rows))]

    def _batches(self, prompts: list[list[int]]) -> list[list[int]]:
        """Return which prompts are decoded together, by their places.

        One by one where the model has recurrent layers, else those of the two sides of
        `Backbone.rotary_boundary` apart; most models have one side.
        """
        places = range(len(prompts))
        if self.is_recurrent:
            return [[place] for place in places]
        boundary = self.backbone.rotary_boundary
        is_long = [boundary is not None and len(prompt) > boundary for prompt in prompts]
        sides = [[place for place in places if is_long[place] == side] for side in (False, True)]
        return [side for side in sides if side]

    def steps(
        self,
        prompts: list[list[int]],
        responses: Responses,
        drafter: Drafter | None = None,
        rule: AcceptanceRule | None = None,
        seed: int | None = None,
    ) -> Iterator[list[list[int]]]:
        """Yield the tokens that each step adds to each row, and gather them in `responses`.

        `seed` is of this answer's draws, in place of the rule's: captured steps belong to a rule.

        Raises:
            UserError: a prompt is empty or leaves no room for a response, or the tree asks for
                draft tokens that the heads do not have.
        """
        drafter = drafter or self.drafter(rule=rule)
        length, last = find_room(self.backbone, prompts, responses.limits)
        with self._step(drafter, rule or self.rule, len(prompts), length) as step:
            if seed is not None:
                step.verifier.restart(seed)
            yield from tree_steps(step, prompts, responses, last)

    def plain_steps(
        self,
        prompts: list[list[int]],
        responses: Responses,
        rule: AcceptanceRule | None = None,
        seed: int | None = None,
    ) -> Iterator[list[list[int]]]:
        """Yield what `steps` does, without heads: the steps of `decode_plain`.

        Raises:
            UserError: a prompt is empty or leaves no room for a response.
        """
        rule = rule or self.rule
        if self.uses_fixed_shapes:
            yield from self.steps(prompts, responses, self.root_only(), rule, seed)
            return
        drawn = rule if seed is None else replace(rule, seed=seed)
        yield from plain_steps(self.backbone, prompts, responses, drawn, self.observer)

    def slots(
        self,
        num_slots: int,
        num_columns: int,
        drafter: Drafter | None = None,
        rule: AcceptanceRule | None = None,
    ) -> Slots | OneByOne:
        """Return what answers a stream of requests, so many at a time, by drafts of the tree.

        `root_only()` as the drafter decodes plainly. With captured steps, one stream at a time.

        Args:
            num_slots: requests at a time.
            num_columns: the most tokens of a request (`Request.room`).
            drafter: that of this decoder's tree by default.
            rule: this decoder's by default.
        """
        drafter, rule = drafter or self.drafter(rule=rule), rule or self.rule
        if self.is_recurrent:
            return OneByOne(self.backbone, drafter, rule, self.observer)
        backbone = self._backbone_of(drafter)
        if not self.uses_fixed_shapes:
            return Slots(EagerSlots(backbone, drafter, rule, num_columns, self.observer), num_slots)
        if backbone not in self._captured_slots:
            self._captured_slots[backbone] = CapturedSlots(backbone, self.observer, self.layers)
        source = self._captured_slots[backbone]
        return Slots(source.open(drafter, rule, num_slots, num_columns), num_slots)

    def slots_with_room(
        self, wanted: int, num_columns: int, drafter: Drafter, rule: AcceptanceRule
    ) -> int:
        """Return how many of so many slots there is memory for; see `memory.slots_with_room`."""
        if self.is_recurrent:  # one at a time, whatever is wanted
            return wanted
        return slots_with_room(self._backbone_of(drafter), drafter, rule, wanted, num_columns)

    def root_only(self) -> Drafter:
        """Return the drafter that drafts nothing: steps over it decode plainly."""
        return root_only(self.backbone.device)

    def drafter(self, tree: Tree | None = None, rule: AcceptanceRule | None = None) -> Drafter:
        """Return what fills a tree with draft tokens: by default this decoder's, for its rule.

        Raises:
            ValueError: there are no heads, or there is no tree.
            UserError: these heads cannot fill such a tree.
        """
        tree = tree or self.tree
        if self.heads is None or tree is None:
            raise ValueError("there are no heads or no tree: use Decoder(model, heads, tree).")
        if self.is_recurrent:
            check_chain(self.backbone.name, tree)
        rule = rule or self.rule
        key = (tree, key_of_rule(rule))
        if key not in self._drafters:
            drafter = build_drafter(self.heads, tree, self.backbone.device, rule)
            if tree.num_lookup:
                check_draft(rule.draft)
                drafter = LookupDrafter(drafter, tree.num_lookup, self.backbone.device)
            self._drafters[key] = drafter
        return self._drafters[key]

    @contextmanager
    def _step(
        self, drafter: Drafter, rule: AcceptanceRule, num_rows: int, length: int
    ) -> Iterator[Step]:
        """Lend a step over an empty cache, for prompts and responses of this length together."""
        if self.is_recurrent:
            yield ChainStep(self.backbone, drafter, rule, self.observer)
            return
        backbone = self._backbone_of(drafter)
        if not self.uses_fixed_shapes:
            yield EagerStep(backbone, drafter, rule, num_rows, length, self.observer)
            return
        if backbone not in self._captured:
            self._captured[backbone] = CapturedSteps(backbone, self.observer, self.layers)
        with self._captured[backbone].lent(drafter, rule, num_rows, length) as step:
            yield step

    def _backbone_of(self, drafter: Drafter) -> Backbone:
        """Return the backbone whose hidden states a drafter reads."""
        if drafter.prefix is None:
            return self.backbone
        assert self._prefixed is not None
        return self._prefixed


def _without_padding(
    input_ids: Tensor, attention_mask: Tensor | None, num_ids: int
) -> list[list[int]]:
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if input_ids.ndim != 2 or not len(input_ids):
        raise ValueError(f"input_ids must be [B, T], not of shape {list(input_ids.shape)}.")
    if mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must be of input_ids' shape {list(input_ids.shape)}, "
            f"not {list(mask.shape)}."
        )
    kept = input_ids[mask.bool()]
    if kept.is_floating_point() or (kept.numel() and not 0 <= kept.min() <= kept.max() < num_ids):
        raise ValueError(f"input_ids must be integers from 0 to {num_ids - 1}.")
    return [row[keep.bool()].tolist() for row, keep in zip(input_ids, mask, strict=True)]
