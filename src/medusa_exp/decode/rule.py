"""Acceptance rule and verifier, and the choice between torch, CPU and CUDA verification.

The torch code of `decode/verify.py` is the specification; the kernels of `decode/cuda/verify.py`,
and on a CPU the walk of `decode/cpu_verify.py`, do the same faster.

B batch, N tree nodes, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from medusa_exp.decode.cpu_verify import verify_on_cpu
from medusa_exp.decode.cuda.draws import KernelDraw, can_draw
from medusa_exp.decode.cuda.filter import KernelFilter, leaves_out
from medusa_exp.decode.cuda.launch import fault_of
from medusa_exp.decode.cuda.runtime import Kernels, kernels_on
from medusa_exp.decode.cuda.topk import KernelTopK
from medusa_exp.decode.cuda.verify import KernelVerify, can_verify
from medusa_exp.decode.distribution import probabilities
from medusa_exp.decode.sampled import Drawn, draw
from medusa_exp.decode.verify import RULES, TreeRelations, Verdict, verify
from medusa_exp.model.argmax import argmax

IMPLEMENTATIONS = ("auto", "torch", "cupy")
DRAFTS = ("top", "sampled")


def pick_verify(name: str, device: torch.device) -> Callable[..., Verdict]:
    """Return `decode.verify.verify`, or what does the same faster: kernels, or a walk on a CPU.

    Args:
        name: torch, cupy, or auto: the kernels on a CUDA device where CuPy is installed and they
            can do what is asked, a walk on a CPU, else torch.
        device: where the logits are.

    Raises:
        UserError: cupy is asked for and cannot be had.
    """
    if name == "auto" and device.type == "cpu":
        return verify_on_cpu
    if name == "cupy":
        return KernelVerify(kernels_on(device))
    kernels = step_kernels(name, device)
    return verify if kernels is None else _kernels_where_they_can(kernels)


def step_kernels(name: str, device: torch.device) -> Kernels | None:
    """Return kernels for the rest of a step that they do, where it verifies by kernels."""
    if device.type != "cuda" or name == "torch" or (name == "auto" and find_spec("cupy") is None):
        return None
    return kernels_on(device)


def pick_draw(name: str, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """Return `decode.sampled.draw`, or what does the same by a kernel wherever it can.

    Arguments are those of `pick_verify`.
    """
    kernels = step_kernels(name, device)
    if kernels is None:
        return draw
    draw_by_kernel = KernelDraw(kernels)

    def draw_where_it_can(q_BMW: Tensor, uniforms_BMR: Tensor) -> Tensor:
        function = draw_by_kernel if can_draw(q_BMW, uniforms_BMR) else draw
        return function(q_BMW, uniforms_BMR)

    return draw_where_it_can


def pick_probabilities(name: str, device: torch.device) -> Callable[..., Tensor]:
    """Return `decode.distribution.probabilities` of logits [B, N, V], filtered by a kernel wherever
    it can.

    Arguments are those of `pick_verify`.
    """
    kernels = step_kernels(name, device)
    if kernels is None:
        return probabilities
    kernel_filter = KernelFilter(kernels)

    def probabilities_where_it_can(
        logits_BNV: Tensor, temperature: float, top_k: int | None, top_p: float | None
    ) -> Tensor:
        if fault_of(logits_BNV) or not leaves_out(top_k, top_p, logits_BNV.shape[2]):
            return probabilities(logits_BNV, temperature, top_k, top_p)
        return probabilities(kernel_filter(logits_BNV, temperature, top_k, top_p), temperature)

    return probabilities_where_it_can


def pick_topk(name: str, device: torch.device) -> KernelTopK | None:
    """Return what puts the heads' likeliest tokens on nodes by a kernel; None leaves it to torch.

    Arguments are those of `pick_verify`.
    """
    kernels = step_kernels(name, device)
    return None if kernels is None else KernelTopK(kernels)


def _kernels_where_they_can(kernels: Kernels) -> Callable[..., Verdict]:
    verify_by_kernels = KernelVerify(kernels)

    def verify_where_they_can(
        logits_BNV: Tensor,
        tokens_BN: Tensor,
        parents_BN: Tensor,
        drawn: Drawn | None = None,
        **options: Any,
    ) -> Verdict:
        function = verify_by_kernels if can_verify(logits_BNV, drawn) else verify
        return function(logits_BNV, tokens_BN, parents_BN, drawn=drawn, **options)

    return verify_where_they_can


@dataclass(frozen=True)
class AcceptanceRule:
    """The arguments of `decode.verify.verify` that stay the same from step to step."""

    name: str = "greedy"
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    epsilon: float = 0.09
    alpha: float = 0.3
    seed: int | None = None
    """Seed of sampling; None draws anew each time."""
    verifier: str = "auto"
    """Who applies the rule: one of IMPLEMENTATIONS."""
    draft: str = "top"
    """What sampling drafts: the heads' likeliest tokens, or draws from them (sampled)."""

    def __post_init__(self) -> None:
        if self.name not in RULES:
            raise ValueError(f"rule={self.name} is not known: use one of {', '.join(RULES)}.")
        if self.verifier not in IMPLEMENTATIONS:
            raise ValueError(
                f"verifier={self.verifier} is not one of {', '.join(IMPLEMENTATIONS)}."
            )
        if self.draft not in DRAFTS:
            raise ValueError(f"draft={self.draft} is not one of {', '.join(DRAFTS)}.")
        if self.draft == "sampled" and self.name != "sampling":
            raise ValueError(f"draft=sampled goes with rule=sampling, not rule={self.name}.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie between 0 and 1.")
        if self.name != "greedy" and not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be above 0, or use greedy.")


GREEDY = AcceptanceRule()


class Verifier:
    """Applies a rule, step after step."""

    def __init__(self, rule: AcceptanceRule, device: torch.device) -> None:
        self.rule = rule
        self._verify = pick_verify(rule.verifier, device)
        self._generator = torch.Generator(device)
        self.uniforms_BN: Tensor | None = None
        """Numbers that all samples are drawn by, where a caller writes its own here; None draws
        them by the rule's seed."""
        self.restart()
        self._options: dict[str, Any] = {
            "rule": rule.name,
            "temperature": rule.temperature,
            "top_k": rule.top_k,
            "top_p": rule.top_p,
            "epsilon": rule.epsilon,
            "alpha": rule.alpha,
        }

    def restart(self, seed: int | None = None) -> None:
        """Begin the draws of a seed anew: of the rule's by default."""
        seed = self.rule.seed if seed is None else seed
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)

    def get_state(self) -> Tensor:
        """Return where the draws stand."""
        return self._generator.get_state()

    def set_state(self, state: Tensor) -> None:
        """Go back to where the draws stood."""
        self._generator.set_state(state)

    def register(self, graph: torch.cuda.CUDAGraph) -> None:
        """Let a CUDA graph draw anew from this generator at each replay."""
        if self.rule.name == "sampling" and self.uniforms_BN is None:
            graph.register_generator_state(self._generator)

    def draw(self, num_rows: int, number: int) -> Tensor | None:
        """Return so many numbers in [0, 1) a row, which a step draws by; None where none does."""
        if self.rule.name != "sampling" or self.uniforms_BN is not None:
            return self.uniforms_BN
        device = self._generator.device
        return torch.rand(num_rows, number, generator=self._generator, device=device)

    def next_token(self, logits_B1V: Tensor, uniforms_B1: Tensor | None = None) -> Tensor:
        """Choose the token after a single one: what `verify` says of a tree that is only a root."""
        if self.rule.name != "sampling":  # by a shorter way: this is the step of the baseline
            return argmax(logits_B1V[:, 0])
        if uniforms_B1 is None:
            uniforms_B1 = self.draw(len(logits_B1V), 1)
        nothing_B1 = torch.zeros(len(logits_B1V), 1, dtype=torch.long, device=logits_B1V.device)
        verdict = self(logits_B1V, nothing_B1, nothing_B1 - 1, max_depth=0, uniforms_BN=uniforms_B1)
        return verdict.next_token_B

    def __call__(
        self,
        logits_BNV: Tensor,
        tokens_BN: Tensor,
        parents_BN: Tensor,
        max_depth: int,
        nodes: TreeRelations | None = None,
        uniforms_BN: Tensor | None = None,
        drawn: Drawn | None = None,
    ) -> Verdict:
        """Return the verdict on a step's trees; see `verify`. Numbers are those of `draw`."""
        options = dict(self._options, uniforms_BN=uniforms_BN, max_depth=max_depth, nodes=nodes)
        return self._verify(logits_BNV, tokens_BN, parents_BN, drawn=drawn, **options)
