"""Heads in vLLM, before a double of it: what they draft there is what they draft here."""

import json
import subprocess
import sys

import pytest
import torch
from exported import export_heads
from fake_vllm import Engine, install
from safetensors.torch import load_file, save_file
from tiny_models import build_model

from medusa_exp.decode.decoder import Decoder
from medusa_exp.decode.drafting import build_drafter
from medusa_exp.decode.loop import Limits
from medusa_exp.decode.one_call import decode_plain
from medusa_exp.errors import UserError
from medusa_exp.model import Backbone, build_heads, load_heads, save_heads
from medusa_exp.model.heads import FAMILIES as KINDS
from medusa_exp.model.heads import heads_input, stack_heads
from medusa_exp.tree import chain

COUNTS = torch.arange(64).flip(0)
FAMILIES = {
    "medusa": {"kind": "medusa", "bias": False, "num_layers": 2},
    "projections alone": {"kind": "medusa", "num_layers": 0},
    "tied": {"kind": "medusa_tied", "num_layers": 2},
    "rank": {"kind": "medusa_lowrank", "rank": 16},
    "frequent": {"kind": "medusa_lowrank", "num_tokens": 40, "token_counts": COUNTS},
    "both": {"kind": "medusa_lowrank", "rank": 16, "num_tokens": 40, "token_counts": COUNTS},
    "hydra": {"kind": "hydra", "num_layers": 2},
    "rooted": {"kind": "rooted"},
    "rooted, frequent, prefix": {
        **{"kind": "rooted", "num_tokens": 40, "token_counts": COUNTS},
        "prefix_attention": True,
    },
    "recurrent": {"kind": "recurrent", "num_layers": 2},
    "recurrent, both": {
        **{"kind": "recurrent", "rank": 16, "num_tokens": 40},
        "token_counts": COUNTS,
    },
    "recurrent, shared": {"kind": "recurrent", "rank": 16, "own_projections": False},
    "recurrent, prefix": {"kind": "recurrent", "prefix_attention": True},
    "medusa, prefix": {"kind": "medusa", "prefix_attention": True},
    "tied, prefix": {"kind": "medusa_tied", "prefix_attention": True},
    "hydra, prefix": {"kind": "hydra", "prefix_attention": True},
}
PROMPTS = [[5, 9, 3], [1] * 13, [7, 7, 2, 60, 11, 8, 9, 33]]


@pytest.fixture
def registry(monkeypatch):
    return install(monkeypatch)


def export(tmp_path, architecture="llama", num_heads=3, **family):
    """Return a backbone that is on disk, heads that have left their start, and their export."""
    torch.manual_seed(0)
    place = tmp_path / architecture
    build_model(architecture, spread=4).save_pretrained(place)
    backbone = Backbone(type(build_model(architecture)).from_pretrained(place).eval())
    heads = build_heads(backbone, num_heads=num_heads, **family)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    save_heads(heads, tmp_path / "heads")
    out = export_heads(tmp_path / "heads", backbone, tmp_path / "exported")
    return backbone, load_heads(tmp_path / "heads", backbone), out


@torch.inference_mode()
def chain_draft(backbone, heads, tokens, num_tokens):
    """Return what our own drafter proposes behind these tokens, computed as in training."""
    drafter = build_drafter(stack_heads(heads, backbone), chain(num_tokens), backbone.device)
    states_1TD = backbone.hidden_states(torch.tensor([tokens[:-1]]))
    read_1TD = heads_input(heads.prefix, states_1TD)
    return drafter(torch.tensor(tokens[-1:]), read_1TD[:, -1]).tokens_BN[0, 1:].tolist()


def test_every_kind_that_engines_know_is_tested():
    tested = {family["kind"] for family in FAMILIES.values()}
    assert tested == set(KINDS)


@pytest.mark.parametrize("runner", ["v1", "v2"])
@pytest.mark.parametrize("name", FAMILIES)
def test_drafts_are_those_of_our_chain(registry, tmp_path, name, runner):
    backbone, heads, out = export(tmp_path, **FAMILIES[name])
    requests, drafted = Engine(registry, backbone, out, 3, runner).generate(PROMPTS, 20)
    assert len(drafted) > 20
    for tokens, guesses in drafted:
        assert guesses == chain_draft(backbone, heads, tokens, 3)
    plain = decode_plain(backbone, PROMPTS, Limits(20))
    ours = Decoder(backbone, heads, chain(3)).decode(PROMPTS, Limits(23))
    for request, alone, response in zip(requests, plain, ours, strict=True):
        assert request.tokens[request.prompt_length :][:20] == alone.tokens
        # The step that begins before the limit counts whole, as engines count it.
        steps, done = [], 1
        for length in response.accept_lengths[1:]:
            if done < 20:
                steps.append(length - 1)
            done += length
        assert request.accepted == steps
    assert sum(sum(request.accepted) for request in requests) > 0


@pytest.mark.parametrize("kind", ["medusa", "medusa_tied", "hydra", "recurrent"])
def test_fewer_tokens_than_heads_and_an_lm_head_with_a_bias(registry, tmp_path, kind):
    backbone, heads, out = export(tmp_path, "phi", kind=kind)
    _, drafted = Engine(registry, backbone, out, 2).generate(PROMPTS, 12)
    for tokens, guesses in drafted:
        assert guesses == chain_draft(backbone, heads, tokens, 2)


def change(out, **keys):
    config = json.loads((out / "config.json").read_text("utf-8")) | keys
    kept = {key: value for key, value in config.items() if value != "absent"}
    (out / "config.json").write_text(json.dumps(kept), "utf-8")


def rename(out, old, new=None):
    tensors = load_file(out / "model.safetensors")
    tensor = tensors.pop(old)
    save_file(tensors | ({new: tensor} if new else {}), out / "model.safetensors")


FAULTS = {
    "num_speculative_tokens=6: .*exported has 3 heads; ask for 1 to 3": lambda out: None,
    "hidden size is 48; the target .* has 32": lambda out: change(out, hidden_size=48),
    "vocabulary is 65; the target .* has 64": lambda out: change(out, vocab_size=65),
    "the target .* is another model, identity": lambda out: change(
        out, medusa_backbone_identity="0" * 64
    ),
    "config.json lacks medusa_rank": lambda out: change(out, medusa_rank="absent"),
    "exported lacks lm_heads.2.weight": lambda out: rename(out, "lm_heads.2.weight"),
    "lm_heads.3.weight in .*exported is no tensor of medusa": lambda out: rename(
        out, "lm_heads.2.weight", "lm_heads.3.weight"
    ),
}


@pytest.mark.parametrize("message", FAULTS)
def test_what_does_not_go_together_is_refused(registry, tmp_path, message):
    backbone, _, out = export(tmp_path, kind="medusa")
    FAULTS[message](out)
    with pytest.raises(UserError, match=message):
        Engine(registry, backbone, out, 6 if "=6" in message else 3)


def test_a_target_that_cannot_be_known_is_said(registry, tmp_path, caplog):
    backbone, _, out = export(tmp_path, kind="medusa")
    backbone.model.config.name_or_path = str(tmp_path / "gone")
    Engine(registry, backbone, out, 3)
    assert "not known whether" in caplog.text


def test_the_plugin_loads_little():
    code = (
        "import sys, importlib.metadata as m;"
        "[e] = [e for e in m.entry_points(group='vllm.general_plugins') if e.name=='medusa_exp'];"
        "e.load(); import medusa_exp.identity;"
        "print(sorted({n.split('.')[0] for n in sys.modules} & set("
        "'torch transformers lightning hydra omegaconf wandb pyarrow jinja2 peft'.split())))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
