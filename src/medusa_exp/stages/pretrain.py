"""Stage pretrain: a data set in; a tokenizer and a small Llama, as a Hugging Face directory, out.

The directory lies in the cache, under a hash of all that made it: runs that ask for the same model
share it. From here on it is treated like any user's model.
"""

import logging
from pathlib import Path

import lightning as L
from filelock import FileLock
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from medusa_exp.config import Config
from medusa_exp.data.datamodule import Batches
from medusa_exp.data.sources import load_split
from medusa_exp.data.tokenized import load_tokenised
from medusa_exp.errors import UserError
from medusa_exp.model.loading import pick_device
from medusa_exp.model.tiny import tiny_dir
from medusa_exp.pretrain.llama import LanguageModelModule, build_llama
from medusa_exp.pretrain.tokenizer import train_tokenizer
from medusa_exp.runs.files import publish
from medusa_exp.train.trainer import build_trainer, pick_precision

log = logging.getLogger(__name__)


def run(config: Config, out: Path) -> dict[str, float]:
    """Pretrain the model that the config names, unless the cache has it."""
    if config.model.kind != "tiny" or config.tokenizer.kind != "trained":
        raise UserError("stage pretrain makes model=tiny with tokenizer=trained: set both.")
    path = tiny_dir(config)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):  # jobs of a sweep ask for the same model
        if (path / "config.json").is_file():
            log.info("the pretrained model is in the cache: %s", path)
            return {}
        return _make(config, out, path)


def _make(config: Config, out: Path, path: Path) -> dict[str, float]:
    L.seed_everything(config.seed, verbose=False)
    tokenizer = train_tokenizer(load_split(config, "train"), config.tokenizer.vocab_size)
    model, loss = _pretrain(config, out, tokenizer)
    with publish(path) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    log.info("pretrained model written to %s", path)
    return {"pretrain/loss": loss}


def _pretrain(
    config: Config,
    out: Path,
    tokenizer: PreTrainedTokenizerFast,
) -> tuple[LlamaForCausalLM, float]:
    settings = config.model.pretrain
    limit = min(config.dataset.max_length, settings.max_position_embeddings)
    documents = load_tokenised(config, tokenizer, limit)
    documents.log()
    model = build_llama(settings, len(tokenizer), tokenizer.eos_token_id)
    module = LanguageModelModule(
        model,
        learning_rate=settings.learning_rate,
        warmup_fraction=settings.warmup_fraction,
        max_steps=settings.max_steps,
    )
    batches = Batches(
        documents.split("train"),
        None,
        batching="padded",
        batch_tokens=settings.batch_tokens,
        row_tokens=limit,
        seed=config.seed,
    )
    precision = pick_precision(config, pick_device(config.device))
    trainer = build_trainer(
        config, out, "pretrain", max_steps=settings.max_steps, precision=precision
    )
    trainer.fit(module, datamodule=batches)
    return model.cpu(), float(trainer.logged_metrics["pretrain/loss"])
