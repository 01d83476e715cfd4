"""Stage export: write the run's heads in the format of an engine, read back and compared.

Beside the heads stand the tree, the calibration and what an engine takes of it, a model card, and
in the card the command that serves them.
"""

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from medusa_exp.config import Config
from medusa_exp.errors import UserError
from medusa_exp.export import card, hf_generate
from medusa_exp.export.formats import WHOLE_MODEL, check_holds
from medusa_exp.export.publishing import export, open_source, place_of, read_back
from medusa_exp.export.settings import SETTINGS, settings
from medusa_exp.identity import identity_of
from medusa_exp.model.backbone import Backbone
from medusa_exp.model.checkpoint import check_fit, load_heads
from medusa_exp.model.heads import MedusaHeadsConfig
from medusa_exp.model.loading import identity_from, load_backbone, load_ends
from medusa_exp.model.source import adapted_path, is_adapters
from medusa_exp.runs.files import read_json, read_jsonl, write_json
from medusa_exp.stages.heads_card import facts_of
from medusa_exp.stages.session import Session
from medusa_exp.stages.why import WHY
from medusa_exp.tree import Tree
from medusa_exp.tree.calibration import CALIBRATION, Calibration, load_calibration

log = logging.getLogger(__name__)

_TREE = "tree.json"
_BESIDE = (_TREE, CALIBRATION)


def run(config: Config, out: Path, session: Session | None = None) -> dict[str, float]:
    """Export the heads; it adds no number."""
    session = session or Session(config, out)
    format_, heads = config.export.format, out / "heads"
    is_whole_model = format_ == WHOLE_MODEL
    place = place_of(config.export, out)
    check_holds(format_, load_heads(heads).config, "the heads of this run")
    backbone, target = open_target(session)
    check_fit(load_heads(heads), backbone, heads)
    source, ours = open_source(heads, backbone, target, config.export.dtype)
    number = ours.num_heads
    tree = _tree(session, ours.config) if is_whole_model else None

    def add(partial: Path) -> None:
        found = None
        if is_whole_model:
            read_back(partial, ours, backbone)
            if tree is not None:
                tree.save(partial / _TREE)
        else:
            found = _add_settings(partial, out, format_, number)
        text = card.card(format_, facts_of(config, out, target), number, found)
        (partial / "README.md").write_text(text, encoding="utf-8")

    if is_whole_model:
        with_code = config.model.trust_remote_code
        hf_generate.write(heads, out / _TREE, target, place, with_code=with_code, add=add)
    else:
        export(source, ours, backbone, format_, place, add=add)
    session.notes.add(format=format_, directory=str(place))
    log.info("exported to %s: read back, and its logits are those of the run's heads", place)
    log.info("serve with:\n%s", card.command(format_, target, str(place.resolve()), number))
    return {}


def _add_settings(partial: Path, out: Path, format_: str, number: int) -> dict[str, Any] | None:
    """Put an engine's settings beside so many heads, and what they come from; return them."""
    records, measured = read_jsonl(out / "records.jsonl"), read_json(out / WHY, {})
    schedule = measured.get("schedule")
    found = settings(format_, number, records, _calibration(out), schedule)
    if found is not None:
        write_json(partial / SETTINGS, found)
    for name in _BESIDE:
        if (out / name).is_file():
            shutil.copy2(out / name, partial / name)
    return found


def _tree(session: Session, heads: MedusaHeadsConfig) -> Tree | None:
    """Return the tree that the config names, over which `Decoder.from_run` decodes too.

    The last evaluation may have tried another, which is in tree.json: that is said. None where
    there is no calibration to take it from: the export then gets tree.json, if there is one.
    """
    file, kind = session.out / _TREE, session.config.tree.kind
    if kind in ("calibrated", "dynamic") and _calibration(session.out) is None:
        return None
    tree = session.tree_of(heads)
    if file.is_file() and Tree.load(file) != tree:
        log.warning(
            "the export decodes over tree=%s of this run's config (%d nodes), and the figures on "
            "its card are of the tree that the last evaluation took, tree.json: stages=[evaluate] "
            "measures the config's, and tree=... exports another",
            *(kind, tree.num_checked),
        )
    return tree


def open_target(session: Session) -> tuple[Backbone, str]:
    """Return the two ends of the heads' backbone, on the CPU, and where an engine finds the model.

    Raises:
        UserError: it cannot be loaded.
    """
    config, spec = session.config, replace(session.spec, device="cpu")
    if config.train.kind == "medusa2" and (adapted := adapted_path(config.run_dir)) is not None:
        if is_adapters(adapted):
            log.warning(
                "these heads belong to the model with the adapters in %s: an engine needs it "
                "merged (train.lora.output=merged)",
                adapted,
            )
        return load_backbone(spec, adapted), str(adapted.resolve())
    path = Path(spec.model_path())
    place = str(path.resolve() if path.exists() else path)  # for other working directories
    if spec.model.quantization is not None:
        return load_backbone(spec), place
    num_layers = spec.model_config().get_text_config().num_hidden_layers
    ends = load_ends(spec, "", "")
    ends.leave_out_body(identity_of(ends.model, num_layers), "")
    if (identity := identity_from(spec, ends, num_layers)) != ends.identity():
        ends.names.rename(identity, "")
    return ends, place


def _calibration(out: Path) -> Calibration | None:
    """Return the run's calibration, if it has one of these heads."""
    try:
        return load_calibration(out)
    except UserError as error:
        log.info("the heads are complete, but no calibration goes with them: %s", error)
        return None
