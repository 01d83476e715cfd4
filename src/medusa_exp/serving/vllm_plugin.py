"""What vLLM asks of its plugins: names for heads that `export.format=vllm` has written.

vLLM finds `register` by the entry point `vllm.general_plugins` of this package, in each of its
processes, and loads `vllm_model` once a draft model's config names it. Written from the source of
vLLM 0.32 and 0.33, and run with both on a CPU; see docs/guide/serving.md.
"""

from typing import Any

ARCHITECTURE = "MedusaExpMTP"
"""What vLLM calls our class, in `architectures` of an exported config.json."""
MODEL_TYPE = "step3p5_mtp"
"""Names a proposer rather than an architecture: with it vLLM takes the ones that tell
`compute_logits` which head is meant (V1's Step3p5MTPProposer, V2's MultiModuleMTPSpeculator)."""


def register() -> None:
    """Tell vLLM of our model; may be called any number of times."""
    from transformers import AutoConfig, PreTrainedConfig
    from vllm import ModelRegistry

    class ExportedHeadsConfig(PreTrainedConfig):
        model_type = MODEL_TYPE

    AutoConfig.register(MODEL_TYPE, ExportedHeadsConfig, exist_ok=True)
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        # By name: the class is imported where it is used, which is after vLLM has its settings.
        ModelRegistry.register_model(ARCHITECTURE, f"medusa_exp.serving.vllm_model:{ARCHITECTURE}")
    _share_lm_head_on_v1()


def _share_lm_head_on_v1() -> None:
    """Let V1 give tied heads the target's lm_head: its proposer for our type gives none at all.

    V2 shares it with every model whose `has_own_lm_head` is False or absent.
    """
    try:
        from vllm.v1.spec_decode.step3p5 import Step3p5MTPProposer
    except ImportError:  # a vLLM without the V1 runner, where there is nothing to mend
        return
    theirs = Step3p5MTPProposer._maybe_share_lm_head  # private: vllm 0.32
    if getattr(theirs, "is_medusa_exp", False):
        return

    def share(self: Any, target: Any) -> None:
        if type(self.model).__name__ != ARCHITECTURE:
            theirs(self, target)
        elif not self.model.has_own_lm_head:
            self.model.lm_head = target.lm_head

    share.is_medusa_exp = True  # type: ignore[attr-defined]
    Step3p5MTPProposer._maybe_share_lm_head = share  # private: vllm 0.32
