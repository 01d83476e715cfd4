"""Config, model and tokenizer in; how tokens are chosen and what ends an answer, out."""

from transformers import PreTrainedTokenizerBase

from medusa_exp.config import Config
from medusa_exp.decode.loop import Limits
from medusa_exp.decode.rule import AcceptanceRule
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


def limits_of(config: Config, backbone: Backbone, tokenizer: PreTrainedTokenizerBase) -> Limits:
    """Return where answers end.

    Raises:
        UserError: as `stop_ids`.
    """
    return Limits(
        config.decode.max_new_tokens,
        stop_ids(config, backbone, tokenizer),
        config.decode.stop_strings,
        tokenizer.decode,
    )


def rule_of(config: Config) -> AcceptanceRule:
    """Return how tokens are chosen."""
    decode = config.decode
    return AcceptanceRule(
        decode.rule,
        decode.temperature,
        decode.top_k,
        decode.top_p,
        decode.epsilon,
        decode.alpha,
        seed=config.seed,
        verifier=decode.verifier,
    )
