"""Stage pretrain: a tokenizer and a small Llama, trained from scratch on the data set.

Both lie in the cache as one Hugging Face directory, under a key of all that made them: runs that
ask for the same model share it. From here on it is treated like any user's model.

B batch, T time, V vocabulary.
"""

import logging
from pathlib import Path
from typing import Any

import lightning as L
import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from medusa_exp.config import Config, PretrainConfig
from medusa_exp.data import Conversation
from medusa_exp.data.datamodule import Batch, Batches
from medusa_exp.errors import UserError
from medusa_exp.runs.cache import entry
from medusa_exp.runs.files import read_json, write_json
from medusa_exp.runs.machine import pick_device
from medusa_exp.stages.how_long import FROM_SCRATCH, WORTH_SAYING, say_how_long
from medusa_exp.stages.session import Session
from medusa_exp.train.launch import be_alone
from medusa_exp.train.optimizer import scheduled
from medusa_exp.train.trainer import build_trainer, pick_precision

log = logging.getLogger(__name__)

_METRICS = "pretrain_metrics.json"
"""Beside the model: its figures, for runs that find it in the cache."""
_END = "<|end|>"
_ROLE_MARKS = ["<|system|>", "<|user|>", "<|assistant|>"]
_CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|{{ message.role }}|>
{{ message.content }}<|end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|assistant|>
{% endif -%}
"""


def run(config: Config, out: Path, session: Session | None = None) -> dict[str, float]:
    """Pretrain the model that the config names, unless the cache has it."""
    session = session or Session(config, out)
    if config.model.kind != "tiny" or config.tokenizer.kind != "trained":
        raise UserError("stage pretrain makes model=tiny with tokenizer=trained: set both.")
    name = session.tiny.name
    with entry(config.cache_dir, "pretrained", name, _is_whole) as (path, partial):
        if partial is None:
            log.info("the pretrained model is in the cache: %s", path)
            found: dict[str, float] = read_json(path / _METRICS, {})
            return found
        settings = config.model.pretrain
        if settings.max_steps >= WORTH_SAYING:
            model = build_llama(settings, config.tokenizer.vocab_size, 0)
            say_how_long(session, model, FROM_SCRATCH, settings.max_steps * settings.batch_tokens)
        L.seed_everything(config.seed, verbose=False)
        tokenizer = train_tokenizer(session.split("train"), config.tokenizer.vocab_size)
        model, loss = _pretrain(config, out, tokenizer, session)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        write_json(partial / _METRICS, metrics := {"pretrain/loss": loss})
    log.info("pretrained model written to %s", path)
    return metrics


def _is_whole(path: Path) -> bool:
    if not all((path / name).is_file() for name in ("config.json", "tokenizer.json")):
        return False
    try:
        with safe_open(path / "model.safetensors", framework="pt"):
            return True  # its header is whole, and so many bytes are there as it says
    except (OSError, SafetensorError):
        return False


def _pretrain(
    config: Config, out: Path, tokenizer: PreTrainedTokenizerFast, session: Session
) -> tuple[LlamaForCausalLM, float]:
    settings = config.model.pretrain
    be_alone()
    limit = min(config.dataset.max_length, settings.max_position_embeddings)
    documents = session.tokenized(tokenizer, limit)
    documents.log()
    model = build_llama(settings, len(tokenizer), tokenizer.eos_token_id)
    module = LanguageModelModule(model, settings)
    batches = Batches(
        documents.split("train"),
        None,
        batching="padded",
        batch_tokens=settings.batch_tokens,
        row_tokens=limit,
        seed=config.seed,
    )
    device = pick_device(config.device)
    trainer = build_trainer(
        device,
        out,
        "pretrain",
        session.log_step,
        max_steps=settings.max_steps,
        precision=pick_precision(config.dtype.precision, device),
    )
    trainer.fit(module, datamodule=batches)
    return model.cpu(), float(trainer.logged_metrics["pretrain/loss"])


def train_tokenizer(conversations: list[Conversation], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the text of conversations, with role marks as special tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_END, *_ROLE_MARKS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (message.content for c in conversations for message in c.messages)
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=_END,
        pad_token=_END,
        extra_special_tokens=_ROLE_MARKS,
        chat_template=_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def build_llama(settings: PretrainConfig, vocab_size: int, eos_token_id: int) -> LlamaForCausalLM:
    """Return it with random weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=settings.hidden_size,
            intermediate_size=settings.intermediate_size,
            num_hidden_layers=settings.num_hidden_layers,
            num_attention_heads=settings.num_attention_heads,
            num_key_value_heads=settings.num_key_value_heads,
            max_position_embeddings=settings.max_position_embeddings,
            bos_token_id=None,
            eos_token_id=eos_token_id,
            pad_token_id=eos_token_id,
            attn_implementation="eager",  # a sixth less time a step than sdpa on a CPU
        )
    )


class LanguageModelModule(L.LightningModule):
    """Plain next-token training on all tokens, prompts too."""

    def __init__(self, model: LlamaForCausalLM, settings: PretrainConfig) -> None:
        super().__init__()
        self.model, self.settings = model, settings

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean cross entropy over real tokens."""
        ids_BT = batch.input_ids_BT
        logits_BTV = self.model(input_ids=ids_BT, use_cache=False).logits
        targets_BT = ids_BT.masked_fill(batch.example_BT == 0, -100)[:, 1:]
        loss = cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), targets_BT.flatten())
        self.log("pretrain/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=self.settings.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=0.1,
            fused=True,
        )
        return scheduled(optimizer, self.settings.warmup_fraction, self.settings.max_steps)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Clip by norm; Lightning's own clipping takes a fused optimizer for one that unscales."""
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), gradient_clip_val)
