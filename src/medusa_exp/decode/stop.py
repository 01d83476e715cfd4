"""Config, model and tokenizer in; what ends an answer out."""

from transformers import PreTrainedTokenizerBase

from medusa_exp.config import Config
from medusa_exp.errors import UserError
from medusa_exp.model.backbone import Backbone


def stop_ids(
    config: Config, backbone: Backbone, tokenizer: PreTrainedTokenizerBase
) -> frozenset[int]:
    """Return the ids that end an answer: the model's, the tokenizer's and decode.stop_ids.

    Raises:
        UserError: a configured id is no token of the model.
    """
    for token in config.decode.stop_ids:
        if not 0 <= token < backbone.vocab_size:
            raise UserError(
                f"decode.stop_ids={token} is no token: the model has {backbone.vocab_size}."
            )
    own = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    return frozenset(backbone.eos_token_ids | own | set(config.decode.stop_ids))
