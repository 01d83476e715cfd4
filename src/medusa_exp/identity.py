"""Which model heads belong to: a sha256 over its dimensions, final norm and lm_head.

Apart from the rest, and with imports that come late, because engines that load our plugin ask it
of a model's files, in processes that should load nothing else of this project.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def identity_of(model: Any, num_layers: int | None = None) -> str:
    """Return the identity of a causal language model of transformers.

    Weights count as bfloat16, so that a model has one identity in whatever dtype it is loaded.

    Args:
        model: with the modules outside its layers at least.
        num_layers: of the whole model, where not all of them were loaded.
    """
    from torch import nn

    config, lm_head = model.config.get_text_config(), model.get_output_embeddings()
    vocab_size, hidden_size = lm_head.weight.shape
    layers = config.num_hidden_layers if num_layers is None else num_layers
    shape = [config.model_type, hidden_size, vocab_size, layers]
    # Medusa-2 has moved the layers too: what training made of them has a name of its own.
    shape += [model.config.medusa_adapter] if hasattr(model.config, "medusa_adapter") else []
    digest = hashlib.sha256(json.dumps(shape).encode())
    for module in [*model.get_decoder().children(), lm_head]:
        # Of the body, what is neither layers nor an embedding: the final norm, and projections.
        if not isinstance(module, nn.ModuleList | nn.Embedding):
            for name, parameter in sorted(module.named_parameters()):
                digest.update(name.encode() + bfloat16_bytes(parameter.detach()))
    return digest.hexdigest()


def identity_of_files(path: str, **hub_options: Any) -> str | None:
    """Return the identity of a model on disk, reading nothing of its layers.

    Args:
        path: its directory, or its hub name where it is in the cache of this machine.
        hub_options: arguments of `from_pretrained`, such as `revision`.

    Returns:
        None where it cannot be known: the files are not here, or not of a form that transformers
        loads alone (such as a quantization with a library of its own).
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {**hub_options, "local_files_only": True}
    try:
        config = AutoConfig.from_pretrained(path, **options)
        num_layers = config.get_text_config().num_hidden_layers
        if hasattr(config, "quantization_config"):  # of the layers: the ends are as they were
            del config.quantization_config
        with loading_without_layers(config):
            model, report = AutoModelForCausalLM.from_pretrained(
                path,
                config=config,
                dtype="auto",
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
    except Exception:  # transformers raises what it likes at models of others
        return None
    return None if report["missing_keys"] else identity_of(model, num_layers)


@contextmanager
def loading_without_layers(config: Any) -> Iterator[None]:
    """Let transformers load all but the layers by this config, which has none from then on.

    In here, for those who name a model and those who load its ends. Nothing is said of what is
    left out while this lasts.
    """
    from transformers.utils import logging

    text = config.get_text_config()
    text.num_hidden_layers = 0
    if getattr(text, "layer_types", None):
        text.layer_types = []
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would list all that is left out
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def bfloat16_bytes(values: Any) -> bytes:
    """Return a tensor's values as bytes of bfloat16."""
    import torch

    return values.to(torch.bfloat16).contiguous().view(torch.uint8).cpu().numpy().tobytes()
