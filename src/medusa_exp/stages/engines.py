"""What stages ask running engines for: who they are, how they are known, and what they measure.

An engine is known by its greedy answers to a few prompts, which must be those of the backbone here.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import asdict

from medusa_exp.config import ServingConfig
from medusa_exp.data.prompts import Prompt
from medusa_exp.decode.decoder import Decoder
from medusa_exp.decode.loop import Limits
from medusa_exp.decode.one_call import decode_plain
from medusa_exp.decode.rule import AcceptanceRule
from medusa_exp.errors import UserError
from medusa_exp.evaluate.near_ties import find_difference
from medusa_exp.model.backbone import Backbone
from medusa_exp.runs.files import write_json, write_jsonl
from medusa_exp.serving.client import Engines, Probe, Work
from medusa_exp.serving.measurement import (
    Drafts,
    Level,
    measure,
    positions_of,
    predicted_drafts,
)
from medusa_exp.stages.session import Session
from medusa_exp.train.regenerated import regeneration_rule

log = logging.getLogger(__name__)

_NUM_PROBES, _PROBE_TOKENS = 4, 16
SERVING, SERVING_RECORDS = "serving.json", "serving.jsonl"
"""Files of a run directory: what was measured of engines, and a record of each of their answers."""


def open_engines(
    key: str,
    urls: str,
    settings: ServingConfig,
    backbone: Backbone,
    prompts: Sequence[list[int]],
    *,
    limits: Limits,
    rule: AcceptanceRule,
    max_length: int,
) -> Engines:
    """Return the engines at some URLs, with commas between them; nothing is sent yet.

    Args:
        key: of the config, that has the URLs.
        urls: of the engines.
        settings: what is said of all engines.
        backbone: in the dtype in which the engines are to have it.
        prompts: some of those that will be asked.
        limits: of responses.
        rule: how tokens are chosen: greedy or sampling.
        max_length: tokens that prompt and response may come to.

    Raises:
        UserError: a URL is none, there is none, or there is no such environment variable.
    """
    work = Work(
        limits,
        rule,
        backbone.vocab_size,
        max_length,
        settings.model,
        _probes(backbone, prompts, limits),
        lambda probe, found: _is_same(backbone, probe, found),
        settings.patience,
    )
    names = [url for url in urls.split(",") if url.strip()]
    if not names:
        raise UserError(f"{key}={urls} names no engine: http://HOST:PORT is one.")
    return Engines(names, work, _key(settings.key_variable))


def _probes(backbone: Backbone, prompts: Sequence[list[int]], limits: Limits) -> list[Probe]:
    """Answer a few short prompts: how an engine goes on tells whether it has the same weights."""
    chosen = sorted(prompts, key=len)[:_NUM_PROBES]
    few = min(_PROBE_TOKENS, limits.max_new_tokens)
    found = decode_plain(backbone, chosen, Limits(few, limits.stop_ids)) if chosen else []
    return [Probe(prompt, response.tokens) for prompt, response in zip(chosen, found, strict=True)]


def _is_same(backbone: Backbone, probe: Probe, found: list[int]) -> bool:
    """Does the engine say the same, or part at tokens that tie within the noise of arithmetic?"""
    difference = find_difference(backbone, probe.prompt, probe.expected, found, num_nodes=8)
    if difference is None:
        return True
    # Each of two logits may move by the noise here, and by as much in the engine.
    is_noise = difference.margin <= 4 * difference.noise
    if is_noise:
        log.warning(
            "an engine answers a probe otherwise from token %d on, where two tokens tie (%.2g "
            "apart, noise %.2g): its arithmetic is not quite the same",
            difference.position,
            difference.margin,
            difference.noise,
        )
    return is_noise


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    if not (key := os.environ.get(variable)):
        raise UserError(
            "serving.key_variable names an environment variable that is not set. It is the name "
            "of one that holds the key, not the key itself."
        )
    return key


def check_servers(session: Session, decoder: Decoder, prompts: list[Prompt]) -> None:
    """Ask the engines that `evaluate` names for an answer, before there is long work to lose.

    Raises:
        UserError: one is not the engine that is needed, or does not answer.
    """
    for engines in _servers(session, decoder, prompts).values():
        measure(engines, [prompts[0].input_ids], [], warmup=1, seed=0)


def _servers(session: Session, decoder: Decoder, prompts: list[Prompt]) -> dict[str, Engines]:
    """Return the engines that `evaluate` names: with heads, and perhaps without."""
    settings, ids = session.config.evaluate, [prompt.input_ids for prompt in prompts]
    urls = {
        "heads": ("evaluate.server", settings.server),
        "plain": ("evaluate.server_plain", settings.server_plain),
    }
    found = {
        name: open_engines(
            key,
            url,
            session.config.serving,
            decoder.backbone,
            ids,
            limits=decoder.limits,
            rule=regeneration_rule(decoder.rule),
            max_length=max(map(len, ids)) + decoder.limits.max_new_tokens,
        )
        for name, (key, url) in urls.items()
        if url is not None
    }
    for name, engines in found.items():
        if len(engines.engines) > 1:
            raise UserError(f"{urls[name][0]} takes one URL, so that one engine is measured.")
    return found


def measure_servers(
    session: Session,
    decoder: Decoder,
    prompts: list[Prompt],
    expected: list[list[int]],
) -> dict[str, float]:
    """Measure the engines that `evaluate` names, and return what stage evaluate says of them.

    Written: serving.json and serving.jsonl.

    Args:
        session: of the run.
        decoder: with the run's heads.
        prompts: what the methods here have answered.
        expected: what plain decoding said here; not compared where tokens are drawn at random.
    """
    settings, ids = session.config.evaluate, [prompt.input_ids for prompt in prompts]
    rule = regeneration_rule(decoder.rule)
    is_random = rule.name != "greedy"
    concurrency = _levels(settings.server_concurrency, len(prompts))
    measured: dict[str, list[Level]] = {}
    about, records = {}, []
    for name, engines in _servers(session, decoder, prompts).items():
        [engine] = engines.engines
        log.info("measuring the engine at %s", engine.url)
        measured[name] = levels = measure(
            engines, ids, concurrency, warmup=settings.warmup_prompts, seed=session.config.seed
        )
        drafts = {level.concurrency: level.drafts for level in levels}
        about[name] = {
            "url": engine.url,
            "model": engine.model,
            "fingerprint": engine.fingerprint,
            "drafts": {str(n): asdict(found) for n, found in drafts.items() if found},
        }
        records += _records(name, levels, prompts, expected, is_random=is_random)
    predicted = _predicted(decoder, measured["heads"][0], ids, rule)
    about["heads"]["predicted_drafts"] = asdict(predicted) if predicted else None
    write_json(session.out / SERVING, about)
    write_jsonl(session.out / SERVING_RECORDS, records)
    return _metrics(measured, predicted, expected, is_random=is_random)


def _levels(concurrency: list[int], num_prompts: int) -> list[int]:
    """Return the numbers of prompts on their way, but for those of which there are not so many."""
    found = sorted({min(level, num_prompts) for level in concurrency})
    if max(concurrency) > num_prompts:
        log.warning(
            "evaluate.server_concurrency=%s: there are only %d prompts, so no more than those are "
            "on their way",
            concurrency,
            num_prompts,
        )
    return found


def _predicted(
    decoder: Decoder, level: Level, prompts: list[list[int]], rule: AcceptanceRule
) -> Drafts | None:
    """Return what the engine should have counted; None where it has not, or draws at random."""
    assert decoder.heads is not None
    if level.drafts is None:
        log.warning(
            "evaluate.server has no counters of drafts at /metrics that are of these prompts "
            "alone, or drafts nothing: is it started with a speculative config? What it accepts "
            "stays unknown."
        )
        return None
    number = positions_of(level.drafts, decoder.heads.num_heads)
    if number is None or rule.name != "greedy":
        return None
    return predicted_drafts(decoder, prompts, [len(tokens) for tokens in level.answers], number)


def _records(
    name: str,
    levels: list[Level],
    prompts: list[Prompt],
    expected: list[list[int]],
    *,
    is_random: bool,
) -> list[dict[str, object]]:
    return [
        {
            "prompt_id": prompt.prompt_id,
            "category": prompt.category,
            "server": name,
            "concurrency": level.concurrency,
            "new_tokens": len(tokens),
            "seconds": seconds,
            "identical": None if is_random else tokens == plain,
        }
        for level in levels
        for prompt, tokens, seconds, plain in zip(
            prompts, level.answers, level.seconds, expected, strict=True
        )
    ]


def _metrics(
    measured: dict[str, list[Level]],
    predicted: Drafts | None,
    expected: list[list[int]],
    *,
    is_random: bool,
) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for name, levels in measured.items():
        server = {"heads": "server", "plain": "server_plain"}[name]
        for level in levels:
            place = f"eval/{server}/c{level.concurrency}"
            metrics[f"{place}/tokens_per_second"] = level.tokens_per_second
            metrics[f"{place}/ms_per_token"] = level.ms_per_token
            if not is_random:
                metrics[f"{place}/identical_fraction"] = level.identical_fraction(expected)
    for level, plain in zip(measured["heads"], measured.get("plain", []), strict=False):
        ratio = level.tokens_per_second / plain.tokens_per_second
        metrics[f"eval/server/c{level.concurrency}/speedup"] = ratio
    for word, drafts in (("", measured["heads"][0].drafts), ("predicted_", predicted)):
        if drafts is not None:
            metrics[f"eval/server/{word}tokens_per_step"] = drafts.tokens_per_step
            for position, share in enumerate(drafts.shares_K, 1):
                metrics[f"eval/server/{word}accepted_position{position}"] = share
    return metrics
