"""What stands beside heads: the model card, the command that serves them, their settings.

A run's own heads have a card (`run_card`), and so has each export (`card`), of the same facts. vLLM
drafts one token of every head in a row, a chain. From the run's records and calibration come
the two settings that it takes of measurements: how many tokens to draft at which batch size
(`num_speculative_tokens_per_batch_size`), and which share of drafts it should accept at each
position (`synthetic_acceptance_rates`, by which its counters can be compared, or load be tried).
"""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medusa_exp.errors import UserError
from medusa_exp.export.formats import WHOLE_MODEL
from medusa_exp.tree.calibration import CALIBRATION, Calibration, Curve

Record = dict[str, Any]
"""A line of records.jsonl: stage evaluate's."""
SETTINGS = "speculative_config.json"
_SCHEDULE = "num_speculative_tokens_per_batch_size"
_METHODS = {"vllm": "mtp", "vllm_medusa": "medusa"}
"""Format -> vLLM's word for how such heads draft."""
_NEEDS = {
    "vllm": "vLLM (tested: 0.32), and in its environment medusa_exp (`pip install "
    "--no-deps CLONE`), whose plugin reads these heads; `mtp` is the method through which it runs.",
    "vllm_medusa": "vLLM 0.32 or earlier: later ones have no medusa method.",
    "tgi": "Text Generation Inference. It drafts for at most 128 tokens at a time.",
    "mlc": "MLC-LLM, and the target converted for it. Not tried by this project.",
    WHOLE_MODEL: "transformers and medusa_exp (`pip install 'CLONE[serve]'`). `model.generate` "
    "then decodes with the tree wherever the model is loaded with `trust_remote_code=True`.",
}
_OF_HEADS_ALONE = (
    "The heads were read back from these files by a reading of the format alone, and their "
    "logits are those of the trained heads. `config.json` names the target's weights "
    "(`medusa_backbone_identity`) and each head (`medusa_heads_sha256`); "
    "`python -m medusa_exp.export.check DIR --target TARGET` compares all that.\n"
)
_OF_WHOLE_MODEL = (
    "The target's own files, `heads/`, `tree.json`, and `custom_generate/generate.py`, a few lines "
    "that call medusa_exp. Without `trust_remote_code` it is the target, and decodes plainly.\n"
)


_LOAD = """\
```python
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from medusa_exp import Decoder, Tree, load_heads

place = Path("DIR")
model = AutoModelForCausalLM.from_pretrained("{target}")
heads, tree = load_heads(place, model), Tree.load(place / "tree.json")
decoder = Decoder(model, heads, tree, tokenizer=AutoTokenizer.from_pretrained(place))
for step in decoder.stream("What is 12 + 30?"):
    print(step.text, end="")
```
"""


@dataclass(frozen=True)
class Facts:
    """What a card says of the run that the heads come from."""

    title: str
    target: str
    """Directory or hub name of the target."""
    is_on_hub: bool
    license: str
    """Of the heads, as an identifier of the hub."""
    target_license: str
    """As the target's own card names it, or unknown."""
    trained: dict[str, Any]
    """How the heads were trained: words and figures."""
    measured: list[tuple[str, str]]
    """What was measured, and its value."""
    hardware: str
    date: str = ""
    """Of the run."""


def chain_rates(
    records: Sequence[Record], calibration: Calibration | None, num_heads: int
) -> tuple[list[float], str] | None:
    """Return the share of drafts accepted up to each position of a chain, and where it is from.

    Measured by method `chain` of stage evaluate where that ran; else from the calibration, whose
    tree need not hold the whole chain: what it lacks is estimated by the heads' own shares.
    """
    chains = [record for record in records if record["method"] == "chain"]
    smallest = min((record["batch_size"] for record in chains), default=1)
    lengths = [
        length
        for record in chains
        if record["batch_size"] == smallest
        for length in record["accept_lengths"][1:]
    ]
    if lengths:
        counts = [sum(length > k for length in lengths) for k in range(1, num_heads + 1)]
        return [count / len(lengths) for count in counts], "measured over a chain"
    if calibration is None:
        return None
    if len(calibration.rank_share) < num_heads or not all(calibration.rank_share):
        raise UserError(
            f"{CALIBRATION} has the shares of {len(calibration.rank_share)} heads, and there are "
            f"{num_heads}: run stage calibrate again."
        )
    by_path = dict(zip(calibration.tree.paths, calibration.node_probability, strict=True))
    rates, last = [], 1.0
    for k in range(num_heads):
        last = min(last, by_path.get((0,) * (k + 1), last * calibration.rank_share[k][0]))
        rates.append(last)
    return rates, "estimated from the calibration"


def schedule(calibration: Calibration, rates: Sequence[float]) -> list[list[int]]:
    """Return [first batch size, last, tokens to draft] for all sizes that were calibrated.

    What drafts most tokens a second by the steps' times of this project's own decoding on the
    machine of the calibration; a chain of n tokens takes as long as a tree of n + 1 nodes. An
    engine keeps the last entry for larger batches.
    """
    curves = sorted(calibration.batch_sizes, key=lambda curve: curve.batch_size)
    firsts = [1, *(curve.batch_size for curve in curves[1:])]
    lasts = [*(first - 1 for first in firsts[1:]), curves[-1].batch_size]
    return [
        [first, max(first, last), _fastest(curve, rates)]
        for first, last, curve in zip(firsts, lasts, curves, strict=True)
    ]


def _fastest(curve: Curve, rates: Sequence[float]) -> int:
    seconds = {point.num_nodes: point.step_seconds for point in curve.curve if point.num_nodes > 1}
    seconds[1] = curve.plain_step_seconds
    nodes = sorted(seconds)
    longest = min(len(rates), nodes[-1] - 1)  # beyond the largest tree nothing was timed
    tokens = 1 + np.concatenate([[0], np.cumsum(rates)])[: longest + 1]
    took = np.interp(np.arange(1, longest + 2), nodes, [seconds[number] for number in nodes])
    return int(np.argmax(tokens / took))


def settings(
    format_: str,
    num_heads: int,
    records: Sequence[Record],
    calibration: Calibration | None,
    measured: list[list[int]] | None = None,
) -> dict[str, Any] | None:
    """Return vLLM's speculative settings without the model, and beside them what was measured.

    `measured` is stage evaluate's schedule, where it measured more than one batch size: it ends
    where whole responses were no faster. Else the schedule is of the calibration's step times.
    """
    if format_ not in _METHODS:
        return None
    found: dict[str, Any] = {
        "speculative_config": {"method": _METHODS[format_], "num_speculative_tokens": num_heads}
    }
    if (of_chain := chain_rates(records, calibration, num_heads)) is not None:
        rates, source = of_chain
        found["synthetic_acceptance_rates"] = [round(rate, 4) for rate in rates]
        found["synthetic_acceptance_rates_are"] = source
        if calibration is not None:
            found[_SCHEDULE] = schedule(calibration, rates)
            found[f"{_SCHEDULE}_is"] = "estimated from the calibration"
    if measured is not None:
        found |= {_SCHEDULE: measured, f"{_SCHEDULE}_is": "measured over whole responses"}
    return found


def command(format_: str, target: str, place: str, num_heads: int) -> str:
    """Return the command that serves an export, of several lines where an engine asks for them."""
    if format_ in _METHODS:
        spoken = {
            "model": place,
            "method": _METHODS[format_],
            "num_speculative_tokens": num_heads,
        }
        return f"vllm serve {shlex.quote(target)} --speculative-config {_quoted(spoken)}"
    if format_ == WHOLE_MODEL:
        return f"transformers serve {shlex.quote(place)} --trust-remote-code"
    if format_ == "tgi":
        return f"text-generation-launcher --model-id {shlex.quote(place)}"
    kind = "--model-type medusa --quantization q0f32"
    place = shlex.quote(place)
    return "\n".join(
        (
            f"mlc_llm convert_weight {place} {kind} -o heads-mlc",
            f"mlc_llm gen_config {place} {kind} --conv-template LM -o heads-mlc",
            "mlc_llm serve TARGET-mlc --additional-models heads-mlc --speculative-mode medusa",
        )
    )


def _quoted(value: dict[str, Any]) -> str:
    return shlex.quote(json.dumps(value))


def card(format_: str, facts: Facts, num_heads: int, found: dict[str, Any] | None) -> str:
    """Return README.md of an export; paths of this machine are not in it."""
    parts = [
        *_opening(facts, f"{num_heads} Medusa heads", f", in the format `{format_}` of medusa_exp"),
        "## Serve\n",
        f"Needs {_NEEDS[format_]}\n",
        f"```\n{command(format_, _name_in_code(facts), 'DIR', num_heads)}\n```\n",
        _about_settings(found),
        *_history(facts, "; not in this engine"),
        "## Files\n",
        _OF_WHOLE_MODEL if format_ == WHOLE_MODEL else _OF_HEADS_ALONE,
        _about_licenses(facts),
    ]
    return "\n".join(part for part in parts if part)


def run_card(facts: Facts, what: str) -> str:
    """Return README.md of the heads of a run; paths of this machine are not in it.

    Args:
        facts: of the run.
        what: the heads are, as `5 Medusa heads`.
    """
    parts = [
        *_opening(facts, what, ""),
        "## Load\n",
        "medusa_exp has to be installed (`pip install CLONE`); `DIR` is this directory, "
        "`snapshot_download` of huggingface_hub returns it for a repository. On the hub the draft "
        "tree lies beside the heads, in a run directory one level above.\n",
        _LOAD.format(target=_name_in_code(facts)),
        "For an engine (vLLM, Text Generation Inference, MLC-LLM, `transformers serve`): "
        "`python -m medusa_exp 'stages=[export]' export.format=vllm run_dir=RUN_DIR`.\n",
        *_history(facts, ""),
        "## License\n",
        _about_licenses(facts),
    ]
    return "\n".join(part for part in parts if part)


def _opening(facts: Facts, what: str, more: str) -> list[str]:
    base = f"base_model: {facts.target}\nbase_model_relation: adapter\n" * facts.is_on_hub
    named = facts.target if facts.is_on_hub else f"`{Path(facts.target).name}` (a local directory)"
    return [
        f"---\nlibrary_name: medusa-exp\npipeline_tag: text-generation\nlicense: {facts.license}\n"
        f"{base}tags:\n- speculative-decoding\n- medusa\n---\n",
        f"# {facts.title}\n",
        f"{what} for {named}{more}. They propose tokens that the target checks: its greedy answers "
        "stay what they are.\n",
    ]


def _name_in_code(facts: Facts) -> str:
    return facts.target if facts.is_on_hub else "TARGET"


def _history(facts: Facts, but: str) -> list[str]:
    measured = "Nothing yet: stage evaluate of the run had not been done.\n"
    if facts.measured:
        when = f", {facts.date}" if facts.date else ""
        how = f"By medusa_exp's own decoding over a tree, on {facts.hardware}{when}{but}."
        measured = f"{how}\n\n{_table(('figure', 'value'), facts.measured)}"
    trained = _table(("setting", "value"), facts.trained.items())
    return ["## How they were trained\n", trained, "## Measured\n", measured]


def _about_licenses(facts: Facts) -> str:
    text = f"License of the target, by its own card: {facts.target_license}."
    if facts.target_license == "unknown":
        text = "License of the target: unknown, for its files do not say."
    if facts.license == "unknown":
        text += (
            " The license of the target holds for the target; whether it reaches these heads is "
            "for you to find out."
        )
    return f"{text}\n"


def _about_settings(found: dict[str, Any] | None) -> str:
    text = ""
    if found is not None and "synthetic_acceptance_rates" in found:
        rates = ", ".join(f"{rate:.1%}" for rate in found["synthetic_acceptance_rates"])
        source = found["synthetic_acceptance_rates_are"]
        text += (
            f"Share of drafts accepted up to each position: {rates} ({source}). The engine's "
            "counters should be near it.\n"
        )
    if found is not None and _SCHEDULE in found:
        text += (
            f"\n`{SETTINGS}` has `{_SCHEDULE}`, how many tokens pay at which batch size "
            f"({found[f'{_SCHEDULE}_is']}): with medusa_exp on its machine. Measure yours.\n"
        )
    return text


def _table(head: tuple[str, str], rows: Any) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in rows)]) + "\n"
