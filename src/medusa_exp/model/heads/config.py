"""Config of the heads, as `heads/config.json` holds it (Hugging Face's convention)."""

from transformers import PreTrainedConfig


class MedusaHeadsConfig(PreTrainedConfig):
    """Shape of the heads, and which backbone they belong to."""

    model_type = "medusa"

    def __init__(
        self,
        kind: str = "medusa",
        num_heads: int = 4,
        num_layers: int = 1,
        bias: bool = True,
        rank: int | None = None,
        num_tokens: int | None = None,
        prefix_attention: bool = False,
        num_attention_heads: int = 1,
        hidden_size: int = 256,
        vocab_size: int = 2048,
        lm_head_bias: bool = False,
        backbone: str = "",
        backbone_identity: str = "",
        **kwargs: object,
    ) -> None:
        self.kind = kind
        self.num_heads = num_heads
        self.num_layers = num_layers
        self.bias = bias
        self.rank = rank
        self.num_tokens = num_tokens
        self.prefix_attention = prefix_attention
        self.num_attention_heads = num_attention_heads
        self.hidden_size = hidden_size
        self.vocab_size = vocab_size
        self.lm_head_bias = lm_head_bias
        self.backbone = backbone
        self.backbone_identity = backbone_identity
        super().__init__(**kwargs)
