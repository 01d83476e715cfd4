"""What the stages of one command share: what they have loaded, and where they take notes.

Here the whole `Config` is taken apart; what loads data and models knows of its own settings alone.
"""

import logging
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from medusa_exp import demo
from medusa_exp.config import Config, from_hydra, load_saved
from medusa_exp.config.continuation import told_of_places
from medusa_exp.config.schema import check_model
from medusa_exp.config.trust import check_saved
from medusa_exp.data import Conversation
from medusa_exp.data.prompts import HasRoom, Prompt, prompts_of
from medusa_exp.data.sources import (
    Source,
    check_files,
    dataset_key,
    files_of,
    load_split,
    open_sources,
)
from medusa_exp.data.tokenized import Tokenized, load_tokenized
from medusa_exp.decode.decoder import Decoder
from medusa_exp.decode.drafting import check_picks
from medusa_exp.decode.loop import Limits
from medusa_exp.decode.on_cpu import pack_decoder, ready_to_draft
from medusa_exp.decode.one_call import decode_plain
from medusa_exp.decode.rule import AcceptanceRule
from medusa_exp.errors import UserError
from medusa_exp.export import importing
from medusa_exp.export.publishing import place_of
from medusa_exp.model.backbone import Backbone
from medusa_exp.model.checkpoint import find_heads, load_heads
from medusa_exp.model.heads import MedusaHeads, MedusaHeadsConfig
from medusa_exp.model.loading import load_backbone
from medusa_exp.model.packed import unpack
from medusa_exp.model.source import ModelSpec, adapted_path, tiny_dir
from medusa_exp.model.tokenizer import differences, load_tokenizer
from medusa_exp.runs.files import read_json, write_json
from medusa_exp.runs.record import Notes
from medusa_exp.runs.seals import check_config
from medusa_exp.stages.early_checks import check_drafts, check_prompts, picks_nodes
from medusa_exp.tracking.history import StepLogger
from medusa_exp.tree import Tree
from medusa_exp.tree.calibration import choose_tree, draft_of

log = logging.getLogger(__name__)

_IMPORTED, _TRIED_PROMPTS = "imported_heads.json", 10
"""Where it is noted what imported heads are worth, and prompts on which that is measured."""
_SAVED_OF_A_LAYER, _COMPILING = 50e-6, 10.0
"""Seconds that a compiled layer saves at each step, and that compiling two graphs of it takes. That
of prompts in many slots takes half as much more, and what it saves is not counted."""


class Session:
    """A command's stages on one run directory; what one has loaded the next need not load again.

    Args:
        config: of the run.
        out: its directory.
        log_step: mirrors the steps of a training, which are written to history.jsonl anyhow.
    """

    def __init__(self, config: Config, out: Path, log_step: StepLogger | None = None) -> None:
        self.config, self.out, self.log_step = config, out, log_step
        # As the call begins: what its own stages open is noted there too.
        self._known_data = frozenset(read_json(out / "run.json", {}).get("data", {}).values())
        self.notes = Notes()
        """Notes for run.json of the running stage."""
        self._backbone: tuple[Path | None, Backbone] | None = None
        self._sources: list[Source] | None = None

    @classmethod
    def of_run(
        cls, run: Path, device: str | None = None, *, trust_remote_code: bool = False
    ) -> "Session":
        """Open a run directory by its saved config.

        With `trust_remote_code` that may say to run Python code that comes with the model.

        Raises:
            UserError: it is none, of another version, or asks for more than a saved run may.
        """
        saved = run / ".hydra" / "config.yaml"
        if not saved.is_file():
            raise UserError(f"{run} is no run directory: it has no .hydra/config.yaml.")
        check_config(run)
        written = load_saved(saved)
        check_saved(written, saved, ["model.trust_remote_code"] if trust_remote_code else [])
        written.stages = ["chat"]  # what asks of the saved ones has asked, or came later
        config = from_hydra(written)
        config.run_dir, config.device = str(run), device or config.device
        return cls(config, run)

    def check_places(self) -> None:
        """Look whether model and data are where the config says, before anything is begun.

        Raises:
            UserError: a directory or file that a stage will read is not there, or what stage
                export would write over is no export.
        """
        config, stages = self.config, {*self.config.stages} - {"report"}
        if "demo" in stages:  # it knows its own files
            return
        has_own = config.train.kind == "medusa2" and adapted_path(self.out) is not None
        if not has_own:
            check_model(config)
        if stages and config.model.kind == "pretrained" and config.model.path and not has_own:
            self.spec.model_path()
        if stages - {"export", "chat"}:
            check_files(config.dataset)
        if "evaluate" in stages and config.evaluate.path is not None:
            check_prompts(config)
        if "train" in stages and config.train.heads_from is not None:
            find_heads("train.heads_from", config.train.heads_from)
        if "export" in stages:
            place_of(config.export, self.out)

    def sources(self) -> list[Source]:
        """Open the data set, once, and note what it is made of for the running stage."""
        dataset = self.config.dataset
        if self._sources is None:
            self._sources = open_sources(dataset, self.config.cache_dir)
        keys = {"dataset": dataset_key(dataset)} if dataset.kind == "synthetic" else {}
        self.notes.add_inputs(files_of(self._sources), **keys)
        return self._sources

    def split(self, name: str) -> list[Conversation]:
        """Read the conversations of train, val or test."""
        return load_split(self.sources(), self.config.dataset, name)

    def tokenized(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Tokenized:
        """Open the tokenized data set, which is built first if it is not there.

        Raises:
            UserError: a later stage would find nothing to answer in it.
        """
        config = self.config
        found = load_tokenized(
            self.sources(),
            config.dataset,
            tokenizer,
            max_length,
            cache_dir=config.cache_dir,
            run_dir=Path(config.run_dir) if config.run_dir else None,
            known_data=self._known_data,
        )
        self.notes.add_inputs(tokenised=found.summary["key"])
        for stage, split in self._later_splits().items():
            try:
                found.split(split)
            except UserError as error:
                raise UserError(f"stage {stage} would find no prompt: {error}") from error
        return found

    def _later_splits(self) -> dict[str, str]:
        """Return the splits whose prompts the stages of this call will answer."""
        found = {"calibrate": "val"} if "calibrate" in self.config.stages else {}
        if "evaluate" in self.config.stages and self.config.evaluate.path is None:
            found["evaluate"] = "test"
        return found

    def prompt_tokens(self, max_positions: int) -> int:
        """Return the tokens that decode.max_new_tokens leaves to a prompt of the data set."""
        config = self.config
        return min(config.dataset.max_length, max_positions) - config.decode.max_new_tokens

    def prompts(
        self,
        split: str,
        backbone: Backbone,
        tokenizer: PreTrainedTokenizerBase,
        num_prompts: int,
    ) -> list[Prompt]:
        """Return prompts of a split's conversations that leave room for a response.

        Raises:
            UserError: none does.
        """
        return prompts_of(
            self.split(split),
            tokenizer,
            max_tokens=self.prompt_tokens(backbone.max_length),
            has_room=self.has_room(backbone),
            num_prompts=num_prompts,
        )

    def has_room(self, backbone: Backbone, spare: int = 0) -> HasRoom:
        """Return what says whether a prompt of some length leaves room for a response.

        `spare`: draft tokens that may stand behind the response, and are not kept.
        """
        new_tokens = self.config.decode.max_new_tokens + spare
        return lambda length: length + new_tokens <= backbone.max_length_from(length)

    @cached_property
    def tiny(self) -> Path:
        """Where the model of stage pretrain lies, or will lie."""
        config = self.config
        return tiny_dir(
            files_of(self.sources()),
            config.dataset,
            config.model.pretrain,
            vocab_size=config.tokenizer.vocab_size,
            seed=config.seed,
            cache_dir=config.cache_dir,
        )

    @property
    def spec(self) -> ModelSpec:
        """Which backbone and tokenizer this run has."""
        config = self.config
        tiny = self.tiny if config.model.kind == "tiny" else None
        return ModelSpec(config.model, config.tokenizer, config.dtype.backbone, config.device, tiny)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer."""
        return load_tokenizer(self.spec)

    def backbone(self, *, is_adapted: bool = True) -> Backbone:
        """Load the backbone, or return the one that is loaded; see `model.loading.load_backbone`.

        Where this run has adapted it (train=medusa2), that is its own, unless `is_adapted` is
        false. One is kept at a time. Nobody may change it: who has to, calls `forget_backbone`.
        """
        backbone = self._loaded(is_adapted)
        unpack([backbone.model])
        return backbone

    def _loaded(self, is_adapted: bool = True) -> Backbone:
        config, spec = self.config, self.spec
        if spec.tiny is not None:
            self.notes.add_inputs(model=spec.tiny.name)
        is_joint = is_adapted and config.train.kind == "medusa2"
        place = adapted_path(config.run_dir) if is_joint else None
        if self._backbone is None or self._backbone[0] != place:
            self.forget_backbone()
            demo.check_used(config.model.path)
            self._backbone = place, load_backbone(spec, place)
        return self._backbone[1]

    def forget_backbone(self) -> None:
        """Keep the backbone no longer, and free its memory: a later stage loads one anew."""
        if self._backbone is not None:
            self._backbone = None
            torch.cuda.empty_cache()  # for other processes too

    def decoder(self, *, is_tree_known: bool = True, is_measured: bool = False) -> Decoder:
        """Load what decodes as this run says: backbone, heads, tree, acceptance rule and limits.

        Args:
            is_tree_known: false leaves the tree out, for who will choose one.
            is_measured: for calibrate and evaluate, whose steps are counted together by
                decode.compile=auto, so that what one predicts is what the other measures.

        Raises:
            UserError: the run has no heads or no tree, or its model cannot be decoded with trees.
        """
        with told_of_places(self.out, self.config):
            check_drafts(self.config, self.out, self.spec)
            backbone, tokenizer = self._loaded(), self.tokenizer()
        heads = load_heads(self.out / "heads", backbone)
        self._check_origin(heads, backbone, tokenizer)
        decoder = decoder_of(
            self.config,
            backbone,
            heads,
            measured_steps(self.config) * is_measured,
            rule=rule_of(self.config),
            limits=limits_of(self.config, backbone, tokenizer),
            tokenizer=tokenizer,
        )
        if is_tree_known:
            decoder.tree, decoder.rule = self.tree(decoder), self.rule()
        elif self.config.tree.kind == "custom":  # it is refused before anything long
            self.tree(decoder)
        elif picks_nodes(self.config):
            check_picks(heads.config.kind, decoder.rule.draft)
        return decoder

    def adopt_heads(self, heads_from: str) -> None:
        """Put the heads that the config names into the run directory.

        Raises:
            UserError: there are none, they lack something, or the run directory has others.
        """

        def vocab_size() -> int:
            return int(self.spec.model_config().get_text_config().vocab_size)

        importing.adopt(heads_from, self.out, vocab_size)

    def _check_origin(
        self, heads: MedusaHeads, backbone: Backbone, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """Compare what heads were trained for with what is here; see the key `heads_match`.

        Raises:
            UserError: they are tied to another lm_head; or were trained with another tokenizer or
                for other weights, which `heads_match` does not let pass.
        """
        place, match = self.out / "heads", self.config.heads_match
        if differing := differences(tokenizer, place):
            what = " and ".join(differing)
            message = f"the heads in {place} were trained with other {what} than this tokenizer's"
            if "tokens" in differing and match != "any":
                raise UserError(f"{message}: set tokenizer.path={place}, or heads_match=any.")
            log.warning("%s: they may guess worse", message)
        config = heads.config
        if not config.backbone_identity:
            importing.check_origin(heads, backbone, place)
            self._try_heads("imported heads", heads, backbone, tokenizer)
        elif has_other_weights(config, backbone) and match != "any":
            message = (
                f"the heads in {place} were trained for other weights of {config.backbone} than "
                f"{backbone.name} has: a fine-tune of it, or one with adapters merged"
            )
            if match == "strict":
                raise UserError(f"{message}. Train heads for this model, or set heads_match=warn.")
            log.warning("%s", message)
            self._try_heads("heads for other weights", heads, backbone, tokenizer)

    def _try_heads(
        self,
        what: str,
        heads: MedusaHeads,
        backbone: Backbone,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        """Say once what heads are worth that may have been trained for other weights."""
        record = self.out / _IMPORTED
        if record.is_file():
            return
        limits = limits_of(self.config, backbone, tokenizer)
        try:
            prompts = self.prompts("val", backbone, tokenizer, _TRIED_PROMPTS)
        except UserError as error:
            log.warning("what the %s are worth here is not known: %s", what, error)
            return
        ids = [prompt.input_ids for prompt in prompts]
        tokens = [decode_plain(backbone, [one], limits)[0].tokens for one in ids]
        responses = list(zip(ids, tokens, strict=True))
        shares = importing.measure_first_choices(heads, backbone, responses)
        log.info(
            "%s, for %s: on %d prompts the first choice of each head is this backbone's token for "
            "%s",
            what,
            heads.config.backbone or "a model not named",
            len(ids),
            ", ".join(f"{share:.0%}" for share in shares),
        )
        write_json(record, {"first_choices": shares, "num_prompts": len(ids)})

    def rule(self, batch_size: int = 1) -> AcceptanceRule:
        """Return how tokens are chosen and what is drafted, for so many rows at a time."""
        config = self.config
        draft = draft_of(config.decode, config.tree, self.out, batch_size)
        return replace(rule_of(config), draft=draft)

    def tree(self, decoder: Decoder, batch_size: int = 1) -> Tree:
        """Return the tree that the config names, for these heads and so many rows at a time."""
        assert decoder.heads is not None
        return self.tree_of(decoder.heads.config, batch_size)

    def tree_of(self, heads: MedusaHeadsConfig, batch_size: int = 1) -> Tree:
        """Return the tree that the config names for heads of this config: no decoder is loaded."""
        settings = self.config.tree
        is_drawn = self.rule(batch_size).draft == "sampled"
        if settings.kind == "calibrated" and settings.lookup is None and is_drawn:
            settings = replace(settings, lookup=0)  # see `check_draft`
        width = heads.head_vocab_size
        return choose_tree(settings, self.out, heads.num_heads, batch_size, width)


def has_other_weights(config: MedusaHeadsConfig, backbone: Backbone) -> bool:
    """Say whether heads name other weights than these; of some models that cannot be told."""
    is_comparable = config.backbone_weights and not getattr(backbone.model, "is_quantized", False)
    if not is_comparable or backbone.is_adapted:  # adapted together with the heads
        return False
    return not backbone.names.has_fingerprint(config.backbone_weights)


def decoder_of(
    config: Config, backbone: Backbone, heads: MedusaHeads | None, steps: int, **options: Any
) -> Decoder:
    """Return a decoder as `decode` says, for about so many steps; `options` are `Decoder`'s."""
    in_int8 = config.decode.int8_heads
    decoder = Decoder(
        backbone,
        None if heads is None else ready_to_draft(heads, backbone, in_int8=in_int8),
        cuda_graph=None if config.decode.cuda_graph else False,
        compiles=compiles(config, backbone, steps),
        **options,
    )
    if config.decode.pack_weights:
        pack_decoder(decoder, config.cache_dir)
    return decoder


def measured_steps(config: Config) -> int:
    """Return about how many plain steps calibrate and evaluate take together."""
    evaluate = config.evaluate
    batches = sum(-(-evaluate.num_prompts // size) for size in evaluate.batch_sizes)
    prompts = batches * evaluate.repeats + config.tree.num_prompts
    return prompts * config.decode.max_new_tokens


def compiles(config: Config, backbone: Backbone, steps: int) -> bool:
    """Are the layers to be compiled, for so many steps (`decode.compile`)?

    On an H200, compiling one of a 7B Llama saves 54 us a layer of a step of one token, and 90 us of
    a tree of 64 nodes, which are launches of small kernels and much the same for other sizes.
    """
    can_pay = backbone.device.type == "cuda" and config.decode.cuda_graph
    saved = steps * backbone.num_layers * _SAVED_OF_A_LAYER
    is_worth_it = can_pay and not backbone.is_spread and saved > _COMPILING
    return config.decode.compile == "true" or (config.decode.compile == "auto" and is_worth_it)


def stop_ids_of(
    config: Config, backbone: Backbone, tokenizer: PreTrainedTokenizerBase
) -> frozenset[int]:
    """Return the ids that end a response: the model's, the tokenizer's and decode.stop_ids.

    Raises:
        UserError: a configured id is no token of the model.
    """
    for token in config.decode.stop_ids:
        if not 0 <= token < backbone.vocab_size:
            raise UserError(
                f"decode.stop_ids={token} is no token: the model has {backbone.vocab_size}."
            )
    of_tokenizer = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    return frozenset(backbone.eos_token_ids | of_tokenizer | set(config.decode.stop_ids))


def limits_of(config: Config, backbone: Backbone, tokenizer: PreTrainedTokenizerBase) -> Limits:
    """Return where responses end.

    Raises:
        UserError: as `stop_ids_of`.
    """
    return Limits(
        config.decode.max_new_tokens,
        stop_ids_of(config, backbone, tokenizer),
        config.decode.stop_strings,
        tokenizer.decode,
    )


def rule_of(config: Config) -> AcceptanceRule:
    """Return how tokens are chosen; decode.draft=auto is top, as before a calibration."""
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
        draft="sampled" if decode.draft == "sampled" else "top",
    )
