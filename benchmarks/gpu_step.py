"""The decode step of a 7B-shaped Llama of random weights, with the kernels and without.

A step is the backbone on the tree, the verification and the commit. It is measured eager with
torch's verification, eager with the kernels, and as one CUDA graph with the kernels.
"""

from collections.abc import Callable
from typing import Any

import torch
from gpu_points import Inputs, Point, make_inputs, tree_of
from gpu_timing import measure
from transformers import AutoModelForCausalLM, LlamaConfig

from medusa_exp.decode.cache import GrowingCache
from medusa_exp.decode.cuda.runtime import Kernels
from medusa_exp.decode.cuda.step import CacheCommit
from medusa_exp.decode.cuda.verify import KernelVerify
from medusa_exp.decode.verify import verify
from medusa_exp.model import Backbone

PAST, NODES, VOCAB = 512, 64, 32000


def random_llama(device: torch.device) -> Backbone:
    """Return a model of Llama-2-7B's shape in bfloat16."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=4096,
    )
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config)
    finally:
        torch.set_default_dtype(torch.float32)
    return Backbone(model.eval().requires_grad_(False))


class Step:
    """One step after PAST tokens, again and again in the same place."""

    def __init__(self, backbone: Backbone, kernels: Kernels, batch: int) -> None:
        device = backbone.device
        self.point = Point("greedy", batch, VOCAB, NODES)
        self.inputs: Inputs = make_inputs(self.point, device)
        tree = tree_of(NODES)
        self.backbone, self.batch, self.depth = backbone, batch, tree.depth
        self.cache = GrowingCache(backbone.model.config.num_hidden_layers, PAST + NODES, batch)
        ids_BT = torch.randint(VOCAB, (batch, PAST), device=device)
        backbone.forward(ids_BT, self.cache, keep=torch.tensor([0], device=device))
        ancestors = torch.from_numpy(tree.mask).to(device).expand(batch, 1, -1, -1)
        past = torch.ones(batch, 1, NODES, PAST, dtype=torch.bool, device=device)
        self.mask = torch.cat([past, ancestors], dim=3)
        self.positions = (PAST + torch.from_numpy(tree.depths).to(device)).expand(batch, -1)
        self.verifier = KernelVerify(kernels)
        states = [s for layer in self.cache.layers for s in (layer.keys, layer.values)]
        self.commit = CacheCommit(kernels, states)
        self.states = states
        self.ends = torch.full((batch,), PAST, device=device)

    def run(self, has_kernels: bool) -> Any:
        """Run the step; the cache is as before."""
        self.cache.set_lengths([PAST] * self.batch)
        logits_BNV, _ = self.backbone.forward(
            self.inputs.tokens_BN, self.cache, mask=self.mask, position_ids_BN=self.positions
        )
        verifier: Callable[..., Any] = self.verifier if has_kernels else verify
        verdict = verifier(
            logits_BNV, self.inputs.tokens_BN, self.inputs.parents_BN, max_depth=self.depth
        )
        if has_kernels:
            self.commit(verdict.path_BL, verdict.num_accepted_B, self.ends, self.ends)
        else:
            from_BL = PAST + verdict.path_BL.clamp(min=0)
            to_L = PAST + torch.arange(from_BL.shape[1], device=from_BL.device)
            row_B1 = torch.arange(self.batch, device=from_BL.device)[:, None]
            for state in self.states:
                state[row_B1, :, to_L] = state[row_B1, :, from_BL]
        return verdict

    def verification_us(self) -> dict[str, dict[str, float]]:
        """Return the time of the verification alone, on logits of the same shape."""
        inputs = self.inputs
        arguments = (inputs.logits_BNV, inputs.tokens_BN, inputs.parents_BN)
        return {
            "kernels": measure([lambda: self.verifier(*arguments, max_depth=self.depth)]),
            "torch": measure([lambda: verify(*arguments, max_depth=self.depth)]),
        }


@torch.inference_mode()
def measure_steps(
    kernels: Kernels, batches: tuple[int, ...], is_over: Callable[[], bool]
) -> list[dict[str, Any]]:
    """Return the step's figures for each batch size."""
    backbone = random_llama(kernels.device)
    found = []
    for batch in batches:
        if is_over():
            found.append({"batch": batch, "left_out": "no time left"})
            continue
        step = Step(backbone, kernels, batch)
        plain = measure(
            [lambda step=step: step.run(False)], repeats=3, at_least=5, with_graph=False
        )
        ours = measure([lambda step=step: step.run(True)], repeats=3, at_least=5)
        alone = step.verification_us()
        found.append(
            {
                "batch": batch,
                "past": PAST,
                "nodes": NODES,
                "vocab": VOCAB,
                "step_us": {
                    "torch_eager": plain["eager_warm"],
                    "kernels_eager": ours["eager_warm"],
                    "kernels_graph": ours["graph_warm"],
                },
                "verification_us": alone,
                "verification_share": alone["kernels"]["graph_warm"] / ours["graph_warm"],
            }
        )
    return found
