"""How long a run will take on this CPU, said before its first long stage.

Only of `+experiment=quickstart` and `from_scratch`, and what is near them: the costs of their
stages were measured against a second's work of the backbone. Else each stage says how long it takes
itself, as soon as it knows.
"""

import logging
import time
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from medusa_exp import demo
from medusa_exp.runs.machine import pick_device
from medusa_exp.stages.session import Session
from medusa_exp.train.trainer import AUTOCAST, pick_precision

log = logging.getLogger(__name__)

_TIMED_ROWS, _TIMED_LENGTH = 4, 128
"""Of the batch that is timed."""
WORTH_SAYING = 100
"""Steps of a training that takes long enough to say how long."""


@dataclass(frozen=True)
class Costs:
    """What later stages cost, in tokens that the backbone is trained on."""

    of_document: float
    """A document that is regenerated, in the batch of the experiment."""
    of_trained: float
    """A token that heads are trained on."""
    answers: float
    """How often calibrate and evaluate answer a prompt, in answers as long as they may be."""


FROM_SCRATCH = Costs(of_document=450, of_trained=0.56, answers=5)
QUICKSTART = Costs(of_document=450, of_trained=0.9, answers=2)


def say_how_long(session: Session, model: LlamaForCausalLM, costs: Costs, pretraining: int) -> None:
    """Log how long the stages will take, by a step or two of the model, and what is quicker.

    Nothing on a GPU, of a short training, and where the number of documents is not known.

    Args:
        session: of the run.
        model: with weights that may be trained, of the shape of the run's backbone.
        costs: of this model.
        pretraining: tokens that the backbone will be trained on first.
    """
    config = session.config
    steps, documents = config.train.max_steps or 0, config.regenerate.num_documents
    device = pick_device(config.device)
    is_known = documents is not None or "regenerate" not in config.stages
    if device.type != "cpu" or steps < WORTH_SAYING or not is_known:
        return
    of_token, of_plain = time_steps(model, pick_precision(config.dtype.precision, device))
    answered = config.evaluate.num_prompts * config.decode.max_new_tokens
    seconds = {
        "pretrain": pretraining * of_token,
        "regenerate": (documents or 0) * costs.of_document * of_token,
        "train": steps * config.train.batch_tokens * costs.of_trained * of_token,
        "evaluate": answered * costs.answers * of_plain,
    }
    minutes = {stage: seconds[stage] / 60 for stage in seconds if stage in config.stages}
    settings = config.model.pretrain
    quicker = f"model.pretrain.max_steps={settings.max_steps // 3} " if pretraining else ""
    log.info(
        "on this machine all of it takes about %.0f minutes (%s). Quicker, with heads that guess "
        "worse: %strain.max_steps=%d; to see only that all works: +experiment=smoke",
        max(1.0, sum(minutes.values())),
        ", ".join(f"{stage} {number:.1f}" for stage, number in minutes.items()),
        quicker,
        steps // 3,
    )


def say_of_quickstart(session: Session) -> None:
    """Log the same before the first stage of a run on the backbone that comes with the package."""
    settings = session.config.model
    is_own = settings.kind == "pretrained"  # and not one that stage pretrain has made
    if is_own and settings.path == str(demo.PLACE / "backbone"):
        model = LlamaForCausalLM(LlamaConfig.from_pretrained(settings.path))
        say_how_long(session, model, QUICKSTART, pretraining=0)


def time_steps(model: LlamaForCausalLM, precision: str) -> tuple[float, float]:
    """Return the seconds of a token of training the model, and of a step of one token.

    Each is the shorter of two: in the first, libraries set themselves up.
    """
    best = [float("inf")] * 2
    length = min(_TIMED_LENGTH, model.config.max_position_embeddings)
    ids_BT = torch.zeros(_TIMED_ROWS, length, dtype=torch.long)
    for _ in range(2):
        start = time.perf_counter()
        dtype = AUTOCAST.get(precision)
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss = model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
        loss.backward()
        middle = time.perf_counter()
        with torch.no_grad():
            model(input_ids=ids_BT[:1, :1], use_cache=False)
        times = (middle - start) / ids_BT.numel(), time.perf_counter() - middle
        best = [min(pair) for pair in zip(best, times, strict=True)]
    return best[0], best[1]
