"""One step of tree decoding: draft, run the backbone on the tree, verify, commit.

This is the loop body of speculative decoding with Medusa heads (arXiv 2401.10774, section 2):

1. Draft. From the backbone's last hidden state the heads propose draft tokens. They fill a tree
   whose root is the one token that is certain but not yet in the KV cache.
2. Forward. The target model runs once over all nodes; a mask lets each node see the cached tokens
   of its row, its ancestors and itself, and its position is its depth behind them.
3. Verify. The acceptance rule picks a path of nodes from the root down, and the backbone's own next
   token after it.
4. Commit. Keys and values of that path move to where the row ends in the cache, those of all other
   nodes are given up; the next token is the root of the next step.

Two classes do this, with the same numbers in their comments. `EagerStep` has tensors of the sizes
that are needed, and looks at the outcome on the host to know them. `CapturedStep` has the same
sizes at every step, so that a CUDA graph holds it whole: how far each row is, which rows go on,
roots and hidden states all lie in tensors that are written in place. On a GPU it is captured once
and replayed (capture.py); elsewhere the same code runs as it is. `captured_steps.py` keeps such
steps from prompt to prompt.

B rows, N tree nodes, L path length, D hidden, V vocabulary.
"""

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from medusa_exp.decode.cache import FixedCache, GrowingCache
from medusa_exp.decode.capture import GraphPool, capture
from medusa_exp.decode.compiled import CompiledLayers
from medusa_exp.decode.cuda.runtime import MAX_NODES
from medusa_exp.decode.drafting import Draft, Drafter
from medusa_exp.decode.lookup import Found
from medusa_exp.decode.masks import StepMask
from medusa_exp.decode.rule import AcceptanceRule, Verifier, step_kernels
from medusa_exp.decode.verify import Verdict
from medusa_exp.errors import UserError
from medusa_exp.model.attention import few_shapes
from medusa_exp.model.backbone import Backbone

log = logging.getLogger(__name__)


class Observer:
    """Is told of the parts of a step as they run. This one, of all decoding that is not being
    profiled, does nothing; `evaluate.step_profile` has one that times them."""

    def part(self, name: str) -> AbstractContextManager[None]:
        """Enclose a part: one of `runs.metric_table.PARTS_OF_TIME`. Parts may be nested."""
        return _NOTHING

    def captured(self, graph: torch.cuda.CUDAGraph) -> None:
        """Hear that the parts since the last capture are in this graph, and have not run yet."""

    def replayed(self, graph: torch.cuda.CUDAGraph) -> None:
        """Hear that this graph has run to its end on the device."""


_NOTHING = nullcontext()
UNOBSERVED = Observer()


class Step(Protocol):
    """Decodes one accepted path of each active row, from `start` to `finish`.

    In between, a device may be at work: nothing of the step, of its cache's rows, or of what was
    written for it may be touched. Both calls belong to one stream of the device.
    """

    backbone: Backbone
    cache: Any
    """To be filled with the prompts before `begin`."""
    verifier: Verifier
    observer: Observer
    found: Found
    """What was looked up for each row, to be written before each start."""
    root_B: Tensor
    hidden_BD: Tensor
    active: list[int]
    """Rows that are decoded, in order."""
    is_at_work: bool
    """Has a device been given a step that has not been finished?"""

    def begin(self, root_B: Tensor, hidden_BD: Tensor, last: int) -> None:
        """Begin after the prompts.

        Args:
            root_B: the token after each prompt.
            hidden_BD: the hidden state that gave it.
            last: the last position that the model has for these prompts.
        """
        ...

    def start(self) -> None:
        """Begin on the device, if the step is captured there; else `finish` does all of it."""
        ...

    def finish(self) -> list[list[int]]:
        """Return the tokens that each active row commits, once the step has been done."""
        ...

    def keep_rows(self, places: list[int]) -> None:
        """Go on with some of the active rows alone."""
        ...

    def activate(self, rows: list[int]) -> None:
        """Decode these rows from now on; the others rest, and their tokens stay in the cache."""
        ...


class EagerStep:
    """A `Step` whose tensors grow with the longest row, and shrink with the number of rows."""

    is_at_work = False

    def __init__(
        self,
        backbone: Backbone,
        drafter: Drafter,
        rule: AcceptanceRule,
        num_rows: int,
        length: int,
        observer: Observer,
    ) -> None:
        """Prepare for prompts and responses of this length together."""
        self.backbone, self.drafter, self.observer = backbone, drafter, observer
        capacity = length + drafter.num_nodes
        self.cache = GrowingCache(backbone.num_layers, capacity, num_rows)
        self.verifier = Verifier(rule, backbone.device)
        self.found = Found(drafter, num_rows, backbone.device)
        self.mask = StepMask(backbone.model, capacity, keeps_full=drafter.prefix is not None)

    def begin(self, root_B: Tensor, hidden_BD: Tensor, last: int) -> None:
        self.root_B, self.hidden_BD, self.last = root_B, hidden_BD, last
        self.active = list(range(len(root_B)))

    def activate(self, rows: list[int]) -> None:
        self.active = rows

    def start(self) -> None:
        """Do nothing: a step needs the host within."""

    def finish(self) -> list[list[int]]:
        part, lengths = self.observer.part, self.cache.lengths
        # 1. Draft
        with part("heads"):
            uniforms_BU = self.verifier.draw(len(self.root_B), self.drafter.num_uniforms)
            draft = self.found.draft(self.root_B, self.hidden_BD, uniforms_BU)
        # 2. Forward
        with part("mask"):
            mask = self.mask.at(lengths, draft.ancestors_BNN, draft.depths_BN)
        position_BN = positions(lengths, draft.depths_BN, self.last)
        with part("backbone"):
            logits_BNV, hidden_BND = self.backbone.forward(
                draft.tokens_BN, self.cache, mask=mask, position_ids_BN=position_BN
            )
        # 3. Verify
        with part("verification"):
            verdict = verdict_on(draft, logits_BNV, self.verifier, uniforms_BU)
        # 4. Commit
        self.root_B, self.hidden_BD = verdict.next_token_B, at_end(hidden_BND, verdict)
        rows = outcome_of(draft, verdict).tolist()  # here the host waits for the device
        tokens, paths = tokens_of(rows), paths_of(rows)
        if len(self.active) < len(paths):
            is_active = set(self.active)
            paths = [path if row in is_active else [] for row, path in enumerate(paths)]
        with part("cache"):
            self.cache.commit(paths)
        return [tokens[row] for row in self.active]

    def keep_rows(self, places: list[int]) -> None:
        """Drop the other rows from the cache and from the step's tensors."""
        if len(places) == len(self.root_B) or not places:
            return
        with self.observer.part("cache"):
            self.cache.keep_rows(places)
        index = torch.tensor(places, device=self.root_B.device)
        self.root_B, self.hidden_BD = self.root_B[index], self.hidden_BD[index]
        self.active = list(range(len(places)))


class CapturedStep:
    """A `Step` of fixed shapes; rows that have ended run along, and nothing of them is kept."""

    def __init__(
        self,
        backbone: Backbone,
        drafter: Drafter,
        rule: AcceptanceRule,
        cache: FixedCache,
        *,
        pool: GraphPool,
        layers: CompiledLayers | None,
        observer: Observer,
    ) -> None:
        """Prepare for any prompts that fit into the cache: see `begin`.

        Args:
            backbone: runs on the trees.
            drafter: makes the trees.
            rule: tells what of them is accepted.
            cache: of as many rows as there are prompts.
            pool: that the graph shares with those of other steps.
            layers: of the backbone, compiled; None runs them as they are.
            observer: is told of the parts.
        """
        self.backbone, self.drafter, self.cache = backbone, drafter, cache
        self.layers, self.observer = layers, observer
        num_rows, device = len(cache.lengths_B), backbone.device
        self.verifier = Verifier(rule, device)
        is_prefixed = drafter.prefix is not None
        self.mask = StepMask(backbone.model, cache.tree_end, keeps_full=is_prefixed)
        self.kernels = step_kernels(rule.verifier, device)
        """Write the mask and keep accepted nodes; None leaves it to torch."""
        self.found = Found(drafter, num_rows, device)
        self.root_B = torch.zeros(num_rows, dtype=torch.long, device=device)
        self.hidden_BD = torch.zeros(
            num_rows, backbone.hidden_size, dtype=backbone.model.dtype, device=device
        )
        self.is_active_B = torch.ones(num_rows, dtype=torch.bool, device=device)
        self.last = torch.zeros((), dtype=torch.long, device=device)
        """The last position that the model has for these prompts."""
        width = 2 + 2 * (drafter.depth + 1)
        self.outcome = torch.zeros(num_rows, width, dtype=torch.long, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._places: list[int] = []
        """Where the graph reads the weights."""
        self._is_capturable = backbone.device.type == "cuda"
        self.is_at_work = False
        self._pool = pool
        self.active: list[int] = []

    def begin(self, root_B: Tensor, hidden_BD: Tensor, last: int) -> None:
        self.root_B.copy_(root_B)
        self.hidden_BD.copy_(hidden_BD)
        self.last.fill_(last)
        self.is_active_B.fill_(True)
        self.active = list(range(len(root_B)))
        self.is_at_work = False  # what a closed generator left comes before this in the stream

    def activate(self, rows: list[int]) -> None:
        self.active = rows
        self._mark_active()

    def prepare(self) -> None:
        """Capture the step, if it can be and has not been yet."""
        if self._is_capturable and self._graph is None:
            self._graph = self._capture()
            self._is_capturable = self._graph is not None

    def check_weights(self) -> None:
        """Forget what was captured, if the model's weights have been moved since."""
        if self._graph is not None and self._places != self._places_of_weights():
            self._graph = None

    def _places_of_weights(self) -> list[int]:
        return [weight.data_ptr() for weight in self.backbone.model.parameters()]

    def start(self) -> None:
        """Replay the graph, if there is one."""
        self.prepare()
        self.is_at_work = self._graph is not None
        if self._graph is not None:
            self._graph.replay()

    def finish(self) -> list[list[int]]:
        if not self.is_at_work:
            self._run()
        rows = self.outcome.tolist()  # the step's one wait for the device
        if self.is_at_work and self._graph is not None:
            self.observer.replayed(self._graph)
        self.is_at_work = False
        return tokens_of([rows[row] for row in self.active])

    def _run(self) -> None:
        part, cache = self.observer.part, self.cache
        # 1. Draft
        with part("heads"):
            uniforms_BU = self.verifier.draw(len(self.root_B), self.drafter.num_uniforms)
            draft = self.found.draft(self.root_B, self.hidden_BD, uniforms_BU)
        # 2. Forward
        with part("mask"):
            mask, position_BN = self._mask_and_positions(draft)
        compiled = self.layers.in_place(cache) if self.layers else nullcontext()
        with part("backbone"), compiled, few_shapes():
            logits_BNV, hidden_BND = self.backbone.forward(
                draft.tokens_BN, cache, mask=mask, position_ids_BN=position_BN
            )
        # 3. Verify
        with part("verification"):
            verdict = verdict_on(draft, logits_BNV, self.verifier, uniforms_BU)
        # 4. Commit
        self.outcome.copy_(outcome_of(draft, verdict))
        with part("cache"):
            cache.commit(verdict, self.is_active_B, self.kernels)
        self.hidden_BD.copy_(at_end(hidden_BND, verdict))
        self.root_B.copy_(verdict.next_token_B)

    def keep_rows(self, places: list[int]) -> None:
        if len(places) < len(self.active):
            self.activate([self.active[place] for place in places])

    def _mark_active(self) -> None:
        active = set(self.active)
        is_active = [row in active for row in range(len(self.root_B))]
        self.is_active_B.copy_(torch.tensor(is_active))

    def _mask_and_positions(self, draft: Draft) -> tuple[Any, Tensor]:
        lengths_B, columns = self.cache.lengths_B, self.cache.capacity
        if self.kernels is not None and self.mask.takes_boolean:
            parents_BN, last = draft.parents_BN, self.last
            return self.mask.by_kernel(self.kernels, lengths_B, columns, parents_BN, last)
        mask = self.mask.over(lengths_B, columns, draft.ancestors_BNN, draft.depths_BN)
        return mask, torch.minimum(lengths_B[:, None] + draft.depths_BN, self.last)

    def _capture(self) -> torch.cuda.CUDAGraph | None:
        """Capture the step, and put everything back that it has changed; None if it cannot be."""
        state = (self.root_B, self.hidden_BD, self.cache.lengths_B)
        saved, draws = [tensor.clone() for tensor in state], self.verifier.get_state()
        # Columns behind the rows' ends are written meanwhile; nothing is seen there.
        self.is_active_B.fill_(False)
        graph = capture(self._run, self._pool, self.verifier.register)
        if graph is None:
            log.warning(
                "%s waits for the host within a step: steps run without a CUDA graph "
                "(decode.cuda_graph=false says so from the start)",
                self.backbone.name,
            )
        else:
            self._places = self._places_of_weights()
            self.observer.captured(graph)
        for tensor, before in zip(state, saved, strict=True):
            tensor.copy_(before)
        self.verifier.set_state(draws)
        self._mark_active()
        return graph


def check_room(drafter: Drafter) -> None:
    """Raise a UserError where a tree is too large for a captured step."""
    if drafter.num_nodes > MAX_NODES:
        raise UserError(
            f"the tree has {drafter.num_nodes} nodes, and a captured step has room for "
            f"{MAX_NODES}: take a smaller tree, or set decode.cuda_graph=false."
        )


def positions(lengths: list[int], depths_BN: Tensor, last: int) -> Tensor:
    """Return position_BN of each node, of which the model has none after `last`.

    Draft tokens beyond it are clamped: none can be accepted, because responses end before.
    """
    lengths_B1 = torch.tensor(lengths, device=depths_BN.device)[:, None]
    return (lengths_B1 + depths_BN).clamp(max=last)


def at_end(hidden_BND: Tensor, verdict: Verdict) -> Tensor:
    """Return hidden_BD of the last node of each path."""
    last_B1 = verdict.path_BL.gather(1, verdict.num_accepted_B[:, None])
    return hidden_BND.gather(1, last_B1[..., None].expand(-1, 1, hidden_BND.shape[2]))[:, 0]


def verdict_on(
    draft: Draft, logits_BNV: Tensor, verifier: Verifier, uniforms_BU: Tensor | None
) -> Verdict:
    """Return what a verifier says of a draft, by what the backbone says of its nodes."""
    return verifier(
        logits_BNV,
        draft.tokens_BN,
        draft.parents_BN,
        draft.nodes.depth,
        draft.nodes,
        uniforms_BU,
        draft.drawn,
    )


def outcome_of(draft: Draft, verdict: Verdict) -> Tensor:
    """Return [B, 2 + 2 L]: next token, draft tokens accepted, path, and the tokens on it."""
    on_path_BL = draft.tokens_BN.gather(1, verdict.path_BL.clamp(min=0))
    first = (verdict.next_token_B[:, None], verdict.num_accepted_B[:, None])
    return torch.cat([*first, verdict.path_BL, on_path_BL], 1)


def tokens_of(rows: list[list[int]]) -> list[list[int]]:
    """Return each row's new tokens, of what `outcome_of` holds."""
    width = (len(rows[0]) - 2) // 2 if rows else 0
    first = 2 + width + 1  # behind the root, which was committed a step before
    return [[*row[first : first + row[1]], row[0]] for row in rows]


def roots_of(rows: list[list[int]]) -> list[int]:
    """Return each row's root, of what `outcome_of` holds."""
    return [row[2 + (len(row) - 2) // 2] for row in rows]


def paths_of(rows: list[list[int]]) -> list[list[int]]:
    """Return each row's accepted nodes, the root first, of what `outcome_of` holds."""
    return [row[2 : 3 + row[1]] for row in rows]
