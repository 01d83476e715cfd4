"""The model card that stands beside heads, and the command that serves them.

A run's own heads have a card (`run_card`), and so has each export (`card`): of the same facts, by
`card.md.jinja`.
"""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from medusa_exp.export.formats import WHOLE_MODEL
from medusa_exp.export.settings import METHODS, SCHEDULE, SETTINGS

_NEEDS = {
    "vllm": "vLLM (tested: 0.32), and in its environment medusa_exp (`pip install "
    "--no-deps CLONE`), whose plugin reads these heads; `mtp` is the method through which it runs.",
    "vllm_medusa": "vLLM 0.32 or earlier: later ones have no medusa method.",
    "tgi": "Text Generation Inference. It drafts for at most 128 tokens at a time.",
    "mlc": "MLC-LLM, and the target converted for it. Not tried by this project.",
    WHOLE_MODEL: "transformers and medusa_exp (`pip install 'CLONE[serve]'`). `model.generate` "
    "then decodes with the tree wherever the model is loaded with `trust_remote_code=True`.",
}


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

    @property
    def target_name(self) -> str:
        """The target's directory without the folders above it, which may be private."""
        return Path(self.target).name


def command(format_: str, target: str, place: str, num_heads: int) -> str:
    """Return the command that serves an export, of several lines where an engine asks for them."""
    if format_ in METHODS:
        spoken = {
            "model": place,
            "method": METHODS[format_],
            "num_speculative_tokens": num_heads,
        }
        quoted = shlex.quote(json.dumps(spoken))
        return f"vllm serve {shlex.quote(target)} --speculative-config {quoted}"
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


def card(format_: str, facts: Facts, num_heads: int, found: dict[str, Any] | None) -> str:
    """Return README.md of an export; paths of this machine are not in it.

    Args:
        format_: as in `export.format`.
        facts: of the run.
        num_heads: that were exported.
        found: the settings that stand beside them, if some do.
    """
    target = facts.target if facts.is_on_hub else "TARGET"
    return _rendered(
        facts,
        f"{num_heads} Medusa heads",
        format=format_,
        is_whole_model=format_ == WHOLE_MODEL,
        needs=_NEEDS[format_],
        command=command(format_, target, "DIR", num_heads),
        settings=found or {},
        settings_file=SETTINGS,
        schedule=SCHEDULE,
    )


def run_card(facts: Facts, what: str) -> str:
    """Return README.md of the heads of a run; paths of this machine are not in it.

    Args:
        facts: of the run.
        what: the heads are, as `5 Medusa heads`.
    """
    return _rendered(facts, what)


def _rendered(facts: Facts, what: str, **values: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("card.md.jinja").render(facts=facts, what=what, **values)
