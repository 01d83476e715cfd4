"""`model.generate` with heads: what `custom_generate/generate.py` of an exported directory calls.

transformers loads that file in place of its own `generate` where a model's directory has it and
`trust_remote_code` is on, in `transformers serve` as anywhere. Prompts, generation config and
streamer are transformers'; the tokens come from our trees, several a step. Whatever of its many
options is not honored is refused: with repetition_penalty ignored, say, the text would be another
than the one that was asked for.
"""

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import cached_file

from medusa_exp.decode.decoder import Decoder
from medusa_exp.decode.loop import Limits
from medusa_exp.decode.rule import GREEDY, AcceptanceRule
from medusa_exp.errors import UserError
from medusa_exp.model.backbone import Backbone
from medusa_exp.model.checkpoint import WEIGHTS, load_heads
from medusa_exp.tree import Tree, chain

log = logging.getLogger(__name__)

_HONORED = {
    *("max_length", "max_new_tokens", "do_sample", "temperature", "top_k", "top_p"),
    *("eos_token_id", "pad_token_id", "stop_strings"),
}
_WITHOUT_EFFECT = {
    # On tokens: how the work is done, and what concerns methods that are refused by other keys.
    *("bos_token_id", "decoder_start_token_id", "transformers_version", "_from_model_config"),
    *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "compile_config"),
    *("disable_compile", "continuous_batching_config", "prefill_chunk_size", "is_assistant"),
    *("early_stopping", "length_penalty", "diversity_penalty", "max_matching_ngram_size"),
    *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
    *("assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight", "num_beam_groups"),
    *("speculation_type", "renormalize_logits", "remove_invalid_values"),
}
_NEUTRAL_ONE = {
    *("num_beams", "num_return_sequences", "repetition_penalty", "encoder_repetition_penalty"),
    *("typical_p", "guidance_scale"),
}
"""Options that change nothing at 1; all others change nothing where they are empty, 0 or False."""
_DEFAULT_TOP_K, _DEFAULT_NEW_TOKENS = 50, 20
"""Those of transformers, where neither the caller nor the model says anything."""
_IGNORED_ARGUMENTS = {"synced_gpus", "use_model_defaults", "negative_prompt_attention_mask"}
_MAX_RULES = 8
"""Acceptance rules a decoder is kept for: on a GPU it captures steps for each."""


def generate(
    model: PreTrainedModel,
    input_ids: Tensor | None = None,
    *,
    attention_mask: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    streamer: Any = None,
    tokenizer: Any = None,
    heads: str | Path | None = None,
    seed: int | None = None,
    **options: Any,
) -> Tensor:
    """Continue prompts as `model.generate` does, in fewer steps.

    Args:
        model: of transformers, loaded from an exported directory or from its own.
        input_ids: prompts [B, T].
        attention_mask: [B, T], 0 at padding.
        generation_config: the model's own by default, which also fills what this one leaves open.
        streamer: is put the prompt, then the tokens of each step, then ended; for one prompt.
        tokenizer: for `stop_strings`; of a processor, its tokenizer.
        heads: the exported directory, where the model was not loaded from it.
        seed: of the draws, where there are any; by default from torch's own generator, so that
            `torch.manual_seed` makes them come again.
        options: of the generation config.

    Returns:
        Prompts and new tokens [B, T + N], padded on the right.

    Raises:
        UserError: an option is not honored, or there are no heads; says which.
    """
    input_ids = options.pop("inputs", None) if input_ids is None else input_ids
    if model.training:
        raise UserError("the model is in training mode: call model.eval() first.")
    config = _merged(model, generation_config, options)
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or not len(input_ids):
        raise UserError("generate needs the prompts' token ids: input_ids=, [B, T].")
    if streamer is not None and len(input_ids) > 1:
        raise UserError(f"a streamer takes one prompt at a time, and there are {len(input_ids)}.")
    rule = _rule(config)
    decoder = _decoder(model, heads, rule)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if mask.shape != input_ids.shape:
        raise UserError(
            f"attention_mask has the shape {tuple(mask.shape)}, and input_ids "
            f"{tuple(input_ids.shape)}: one value for each token."
        )
    prompts = [row[keep.bool()].tolist() for row, keep in zip(input_ids, mask, strict=True)]
    limits = _limits(decoder.backbone, config, prompts, input_ids.shape[1], tokenizer)
    if rule is not GREEDY and seed is None:
        seed = int(torch.randint(2**31, ()))
    if streamer is not None:
        streamer.put(input_ids.cpu())

    def put(added: Sequence[list[int]]) -> None:
        if streamer is not None and added[0]:
            streamer.put(torch.tensor(added[0]))

    responses = decoder.decode(prompts, limits, rule=rule, seed=seed, on_step=put)
    if streamer is not None:
        streamer.end()
    return _joined(input_ids, [response.tokens for response in responses], config)


def _merged(
    model: PreTrainedModel, given: GenerationConfig | None, options: dict[str, Any]
) -> GenerationConfig:
    """Return the generation config with what it leaves open filled in, as transformers does it."""
    config: GenerationConfig = copy.deepcopy(given or model.generation_config)
    for name, value in model.generation_config.to_dict().items():
        if getattr(config, name, None) is None:
            setattr(config, name, value)
    left = config.update(**options)
    for name, value in left.items():
        is_empty = value is None or (isinstance(value, Sequence) and not len(value))
        if not is_empty and name not in _IGNORED_ARGUMENTS:
            raise UserError(f"decoding with Medusa heads does not take {name}: leave it out.")
    for name, value in config.to_dict().items():
        if name in _HONORED | _WITHOUT_EFFECT or value in (None, False, 0, [], {}, ""):
            continue
        if not (name in _NEUTRAL_ONE and value == 1):
            raise UserError(
                f"decoding with Medusa heads does not honor {name}={value}: leave it out, or load "
                "the model without trust_remote_code."
            )
    return config


def _rule(config: GenerationConfig) -> AcceptanceRule:
    temperature = 1.0 if config.temperature is None else float(config.temperature)
    if not config.do_sample or temperature == 0:
        return GREEDY
    top_k = _DEFAULT_TOP_K if config.top_k is None else int(config.top_k)
    top_p = 1.0 if config.top_p is None else float(config.top_p)
    try:
        return AcceptanceRule("sampling", temperature, top_k or None, top_p if top_p < 1 else None)
    except ValueError as error:
        raise UserError(str(error)) from error


def _limits(
    backbone: Backbone,
    config: GenerationConfig,
    prompts: list[list[int]],
    width: int,
    tokenizer: Any,
) -> Limits:
    """Return where responses end: no later than where the model has no more positions."""
    wanted = config.max_new_tokens
    if wanted is None and config.max_length is None:
        wanted = _DEFAULT_NEW_TOKENS
    elif wanted is None:
        wanted = config.max_length - width
    if wanted < 1:
        raise UserError(
            f"max_length={config.max_length} leaves no room behind a prompt of {width} tokens: set "
            "max_new_tokens."
        )
    room = min(backbone.max_length_from(len(prompt)) for prompt in prompts) - max(map(len, prompts))
    if 0 < room < wanted:
        log.info("the model has positions for %d more tokens, not for %d", room, wanted)
        wanted = room
    eos = config.eos_token_id
    stop_ids = [] if eos is None else eos if isinstance(eos, list) else [int(eos)]
    strings = config.stop_strings or []
    strings = [strings] if isinstance(strings, str) else list(strings)
    if not strings:
        return Limits(wanted, stop_ids)
    if tokenizer is None:
        raise UserError("stop_strings need tokenizer=, to know the text of tokens.")
    return Limits(wanted, stop_ids, strings, getattr(tokenizer, "tokenizer", tokenizer).decode)


def _decoder(model: PreTrainedModel, heads: str | Path | None, rule: AcceptanceRule) -> Decoder:
    """Return the model's decoder: kept with it, and captured steps with that, between calls."""
    place = _place(model, heads)
    kept: tuple[Path, Decoder, set[AcceptanceRule]] | None = getattr(model, "_medusa_exp", None)
    if kept is None or kept[0] != place or len(kept[2] | {rule}) > _MAX_RULES:
        backbone = Backbone(model)
        loaded = load_heads(place / "heads", backbone)
        file = place / "tree.json"
        tree = Tree.load(file) if file.is_file() else chain(loaded.num_heads)
        kept = place, Decoder(backbone, loaded, tree), set()
        model._medusa_exp = kept
    kept[2].add(rule)
    return kept[1]


def _place(model: PreTrainedModel, heads: str | Path | None) -> Path:
    """Return the directory that holds heads/: a local one, or the hub's as it lies in the cache."""
    name = str(heads or model.config.name_or_path)
    if (Path(name) / "heads" / "config.json").is_file():
        return Path(name)
    if heads is None and not Path(name).exists():
        try:
            for file in ("tree.json", f"heads/{WEIGHTS}", "heads/config.json"):
                found = cached_file(name, file)
            return Path(found).parents[1]
        except OSError as error:
            raise UserError(f"{name} holds no heads/ and tree.json: {error}") from error
    raise UserError(
        f"{name} holds no heads/config.json: load the model from a directory that "
        "export.format=hf_generate has written, or name it: generate(..., heads=DIR)."
    )


def _joined(input_ids: Tensor, responses: list[list[int]], config: GenerationConfig) -> Tensor:
    eos = config.eos_token_id
    pad = config.pad_token_id
    if pad is None:
        pad = (eos[0] if isinstance(eos, list) else eos) if eos else 0
    width = max(map(len, responses))
    rows = [tokens + [pad] * (width - len(tokens)) for tokens in responses]
    return torch.cat([input_ids, torch.tensor(rows).to(input_ids)], 1)
