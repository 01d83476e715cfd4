"""What a later stage of the command would refuse, asked before anything long has been done.

What the config alone tells is refused as it is made (`config/schema.py`), and what is not there
before a run is begun (`Session.check_places`). Here is what concerns two packages at once, in the
order in which it can be told: by the file of prompts (`check_prompts`), by the model's config
(`check_drafts`), by the model (`check_training`), by the family of heads (`check_family`), which
head.kind=auto leaves to stage train. A stage that runs by itself asks for what it depends on.
"""

from pathlib import Path

from medusa_exp.config import Config
from medusa_exp.data import read_conversations
from medusa_exp.data.prompts import is_question_file, read_questions
from medusa_exp.data.sources import reading_options
from medusa_exp.decode.compatibility import check_tree_attention
from medusa_exp.decode.drafting import check_picks
from medusa_exp.decode.lookup import check_draft
from medusa_exp.decode.recurrent import check_chain, check_prefix, has_recurrent_layers
from medusa_exp.errors import UserError
from medusa_exp.export import hf_generate
from medusa_exp.export.formats import WHOLE_MODEL, check_holds
from medusa_exp.model.backbone import Backbone
from medusa_exp.model.heads import MedusaHeadsConfig
from medusa_exp.model.source import ModelSpec
from medusa_exp.tree import Tree
from medusa_exp.tree.calibration import CALIBRATION, choose_tree, load_calibration

_BRANCHED, _A_FORK = ("medusa_63", "dynamic"), Tree.from_paths([[0], [1]])
"""Trees that have branches whatever the heads are; the least that has."""


def prompt_file(config: Config) -> Path:
    """Return where the prompts of stage evaluate are, where they are not the data set's.

    Raises:
        UserError: nothing is there.
    """
    path = Path(str(config.evaluate.path))
    if not path.exists():
        raise UserError(f"evaluate.path={path} does not exist.")
    return path


def check_prompts(config: Config) -> None:
    """Read as much of the file of prompts as tells whether stage evaluate can.

    Raises:
        UserError: nothing is there, or nothing that can be read.
    """
    path = prompt_file(config)
    if path.is_file() and is_question_file(path):
        read_questions(path)
    else:
        next(iter(read_conversations(path, **reading_options(config.dataset))), None)


def check_drafts(config: Config, out: Path, spec: ModelSpec) -> None:
    """Ask whether the model can check what the config has it drafted, by the model's config alone.

    Raises:
        UserError: it has recurrent layers, and the tree has branches, or the heads attention;
            or some tokens are to be drawn, and others looked up; or the tree does not fit the
            heads that are to be trained.
    """
    if config.tree.lookup:
        check_draft(config.decode.draft)
    if picks_nodes(config):
        check_picks(config.head.kind if "train" in config.stages else None, config.decode.draft)
    _check_calibrated(config, out)
    model_config = spec.model_config()
    is_custom = config.tree.kind == "custom"
    if is_custom and "train" in config.stages and config.uses_tree:
        width = model_config.get_text_config().vocab_size
        width = min(config.head.num_tokens or width, width)
        choose_tree(config.tree, out, config.head.num_heads, head_vocab_size=width)
    if not has_recurrent_layers(model_config):
        return
    name = f"model.path={spec.model_path()}"
    check_prefix(name, config.head.prefix_attention)
    if config.tree.kind in _BRANCHED:
        check_chain(name, _A_FORK)
    check_chain(name, Tree((-1,), (-1,), num_lookup=config.tree.lookup or 0))
    if is_custom:
        check_chain(name, choose_tree(config.tree, out, config.head.num_heads))


def picks_nodes(config: Config) -> bool:
    """Will a stage of this call decode with tree=dynamic? Calibration can do without."""
    return config.tree.kind == "dynamic" and bool({"evaluate", "chat"} & {*config.stages})


def _check_calibrated(config: Config, out: Path) -> None:
    """Ask whether the tree of heads that are to be trained will be known where it is used.

    Raises:
        UserError: no stage will have calibrated one by then, and none is there.
    """
    stages = config.stages
    uses = [number for number, stage in enumerate(stages) if stage in ("evaluate", "chat")]
    if "train" not in stages or not uses or "calibrate" in stages[: uses[0]]:
        return
    is_calibrated = (out / CALIBRATION).is_file()  # perhaps of these heads
    if config.tree.kind in ("calibrated", "dynamic") and not is_calibrated:
        load_calibration(out)


def check_training(config: Config, out: Path, spec: ModelSpec, backbone: Backbone) -> None:
    """Ask, before another stage that may take hours, what stage train will ask of the same command.

    Raises:
        UserError: it could not train such heads for this backbone.
    """
    if "train" not in config.stages:
        return
    check_drafts(config, out, spec)
    check_tree_attention(backbone)
    settings = config.train
    if settings.batching == "packed" and settings.features == "online":
        backbone.check_packing()
    if config.head.kind != "auto":
        check_family(config, backbone)


def check_family(config: Config, backbone: Backbone) -> None:
    """Ask whether heads of this head.kind, no longer auto, suit the stages that follow.

    Raises:
        UserError: nodes of their tree cannot be picked; or stage export is to write a format that
            has no place for something of theirs, or model files without rows that they propose.
    """
    head = config.head
    if picks_nodes(config):
        check_picks(head.kind, config.decode.draft)
    if "export" not in config.stages:
        return
    shape = MedusaHeadsConfig(
        kind=head.kind,
        prefix_attention=head.prefix_attention,
        lm_head_bias=getattr(backbone.lm_head, "bias", None) is not None,
    )
    check_holds(config.export.format, shape, "the heads of this run")
    is_whole = config.export.format == WHOLE_MODEL and config.train.kind == "medusa1"
    if is_whole and config.tokenizer.resize_embedding:
        place = str(backbone.model.config.name_or_path)
        whose = "export.format=hf_generate: the heads will be trained for the model as it is loaded"
        hf_generate.check_files(place, backbone.identity(), whose)
