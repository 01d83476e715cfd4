"""Config of the heads, as `heads/config.json` holds it (Hugging Face's convention)."""

from transformers import PreTrainedConfig


class MedusaHeadsConfig(PreTrainedConfig):
    """Shape of the heads, and which backbone they belong to; transformers makes it a dataclass.

    Imported heads may say nothing of their backbone: `backbone_identity` is then empty. So is
    `backbone_weights`, a fingerprint of all its weights, in heads that were saved before there was
    one. Those that are tied to a matrix which came with them have its digest in `lm_head_sha256`.
    Recurrent heads that were saved before `own_projections` have one projection for all.
    """

    model_type = "medusa"

    kind: str = "medusa"
    num_heads: int = 4
    num_layers: int = 1
    bias: bool = True
    rank: int | None = None
    num_tokens: int | None = None
    own_projections: bool = False
    prefix_attention: bool = False
    num_attention_heads: int = 1
    hidden_size: int = 256
    vocab_size: int = 2048
    lm_head_bias: bool = False
    backbone: str = ""
    backbone_identity: str = ""
    backbone_weights: str = ""
    lm_head_sha256: str = ""

    @property
    def head_vocab_size(self) -> int:
        """W, the number of tokens that a head can draft."""
        return self.num_tokens or self.vocab_size
