"""A step of tree decoding whose shapes never change, so that a CUDA graph can hold it whole.

The cache has room for prompt and answer, and columns of its own for the tree behind them. How far
each row is, which rows go on, roots and hidden states: all lie in tensors that are written in
place, and nothing is asked of the host but to read the outcome. On a GPU the step is captured once
and replayed; elsewhere the same code runs as it is.

B rows, N tree nodes, V vocabulary, D hidden. Columns are those of the cache before the tree's.
"""

import logging
from typing import Any

import torch
from torch import Tensor

from medusa_exp.decode.cuda.runtime import Kernels
from medusa_exp.decode.draft import Draft, Proposer
from medusa_exp.decode.masks import StepMask
from medusa_exp.decode.rule import Judge
from medusa_exp.decode.static_cache import StaticCache
from medusa_exp.decode.step import at_end, outcome, read_outcome
from medusa_exp.model.backbone import Backbone

log = logging.getLogger(__name__)

_WARM_UPS = 3
"""Runs before capture: libraries choose and allocate at their first calls."""


class StaticStep:
    """Decodes one accepted path a row at each call; rows that have ended run along unheeded."""

    def __init__(
        self,
        backbone: Backbone,
        propose: Proposer,
        judge: Judge,
        cache: StaticCache,
        mask: StepMask,
        *,
        kernels: Kernels | None = None,
        pool: Any = None,
    ) -> None:
        """Prepare for any prompts that fit into the cache: see `begin`.

        Args:
            backbone: runs on the trees.
            propose: makes the trees.
            judge: tells what of them comes true.
            cache: of as many rows as there are prompts.
            mask: of the backbone, for this cache.
            kernels: that write the mask and keep accepted nodes; None leaves it to torch.
            pool: of the memory that a captured graph works in.
        """
        self.backbone, self.propose, self.judge = backbone, propose, judge
        self.cache, self.mask, self.kernels = cache, mask, kernels
        num_rows, device = len(cache.lengths_B), backbone.device
        self.root_B = torch.zeros(num_rows, dtype=torch.long, device=device)
        self.hidden_BD = torch.zeros(
            num_rows, backbone.hidden_size, dtype=backbone.model.dtype, device=device
        )
        self.is_active_B = torch.ones(num_rows, dtype=torch.bool, device=device)
        self.last = torch.zeros((), dtype=torch.long, device=device)
        """The last position that the model has for these prompts."""
        width = 2 + 2 * (propose.depth + 1)
        self.outcome = torch.zeros(num_rows, width, dtype=torch.long, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._is_capturable = backbone.device.type == "cuda"
        self._pool = pool
        self._active: list[int] = []

    def begin(self, root_B: Tensor, hidden_BD: Tensor, last: int) -> None:
        """Begin after prompts that are in the cache; see `step.Step`."""
        self.root_B.copy_(root_B)
        self.hidden_BD.copy_(hidden_BD)
        self.last.fill_(last)
        self.is_active_B.fill_(True)
        self._active = list(range(len(root_B)))

    def advance(self) -> list[list[int]]:
        """Return the tokens that each active row commits; see `step.Step`."""
        if self._is_capturable and self._graph is None:
            self._graph = self._capture()
            self._is_capturable = self._graph is not None
        if self._graph is not None:
            self._graph.replay()
        else:
            self._run()
        rows = self.outcome.tolist()  # the step's one wait for the device
        said, _ = read_outcome([rows[row] for row in self._active])
        return said

    def keep(self, places: list[int]) -> None:
        """Go on with some of the active rows alone; see `step.Step`."""
        if len(places) < len(self._active):
            self._active = [self._active[place] for place in places]
            self._mark_active()

    def _mark_active(self) -> None:
        is_active = [row in set(self._active) for row in range(len(self.root_B))]
        self.is_active_B.copy_(torch.tensor(is_active))

    def _run(self) -> None:
        cache = self.cache
        draft = self.propose(self.root_B, self.hidden_BD)
        mask, position_BN = self._mask_and_positions(draft)
        logits_BNV, hidden_BND = self.backbone.forward(
            draft.tokens_BN,
            cache,
            mask=mask,
            position_ids_BN=torch.minimum(position_BN, self.last),
        )
        verdict = self.judge(
            logits_BNV, draft.tokens_BN, draft.parents_BN, self.propose.depth, draft.nodes
        )
        self.outcome.copy_(outcome(draft, verdict))
        cache.commit(verdict, self.is_active_B, self.kernels)
        self.hidden_BD.copy_(at_end(hidden_BND, verdict))
        self.root_B.copy_(verdict.next_token_B)

    def _mask_and_positions(self, draft: Draft) -> tuple[Any, Tensor]:
        lengths_B, columns = self.cache.lengths_B, self.cache.capacity
        if self.kernels is not None and self.mask.takes_boolean:
            return self.mask.by_kernel(self.kernels, lengths_B, columns, draft.parents_BN)
        mask = self.mask.over(lengths_B, columns, draft.ancestors_BNN, draft.depths_BN)
        return mask, lengths_B[:, None] + draft.depths_BN

    def _capture(self) -> torch.cuda.CUDAGraph | None:
        """Run the step a few times, put everything back, and capture it.

        None if the model waits for the host somewhere: no graph can hold that.
        """
        state = (self.root_B, self.hidden_BD, self.cache.lengths_B)
        saved, draws = [tensor.clone() for tensor in state], self.judge.get_state()
        # Columns behind the rows' ends are written meanwhile; nothing is seen there.
        self.is_active_B.fill_(False)
        graph = None
        if self._warm_up():
            graph = torch.cuda.CUDAGraph()
            self.judge.register(graph)
            with torch.cuda.graph(graph, pool=self._pool):
                self._run()
        for tensor, before in zip(state, saved, strict=True):
            tensor.copy_(before)
        self.judge.set_state(draws)
        self._mark_active()
        return graph

    def _warm_up(self) -> bool:
        """Run the step as libraries need it before a capture; return whether it can be captured."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                self._run()
            can_be_captured = self._runs_without_waiting()
        torch.cuda.current_stream().wait_stream(stream)
        return can_be_captured

    def _runs_without_waiting(self) -> bool:
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            self._run()
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            log.warning(
                "%s waits for the host within a step: steps run without a CUDA graph "
                "(decode.cuda_graph=false says so from the start)",
                self.backbone.name,
            )
            return False
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        return True
