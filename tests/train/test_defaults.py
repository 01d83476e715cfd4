"""What automatic settings become, and that a training that resumes keeps them."""

import json
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from medusa_exp.config import Config, DecodeConfig, TrainConfig, TreeConfig
from medusa_exp.errors import UserError
from medusa_exp.model import loss as loss_module
from medusa_exp.runs import seals
from medusa_exp.stages import train
from medusa_exp.train import defaults
from medusa_exp.train.defaults import chunk_rows, learning_rate, settle, with_objective

GB = 2**30


def run(config, out):
    out.mkdir(exist_ok=True)
    return train.run(config, out)


def settled(out) -> dict:
    return torch.load(out / "checkpoints/last.ckpt", weights_only=True)["settled"]


SAMPLED = {"rule": "sampling"}


@pytest.mark.parametrize(
    ("train_", "decode", "tree", "expected"),
    [
        ({}, {}, {}, "ce decay"),
        ({}, SAMPLED, {}, "nla acceptance"),
        ({}, {**SAMPLED, "temperature": 0.7}, {}, "nla acceptance"),
        ({}, {**SAMPLED, "temperature": 0.69}, {}, "ce decay"),
        ({}, {**SAMPLED, "draft": "top"}, {}, "ce decay"),
        ({}, SAMPLED, {"kind": "dynamic"}, "ce decay"),
        ({}, SAMPLED, {"kind": "chain"}, "ce decay"),
        ({}, SAMPLED, {"lookup": 4}, "ce decay"),
        ({}, SAMPLED, {"lookup": 0}, "nla acceptance"),
        ({}, {**SAMPLED, "draft": "sampled"}, {"kind": "chain"}, "nla acceptance"),
        ({}, {"rule": "typical"}, {}, "ce decay"),
        ({"kind": "medusa2"}, SAMPLED, {}, "ce decay"),
        ({"loss": "nla"}, {}, {}, "nla acceptance"),
        ({"loss": "lk"}, SAMPLED, {}, "lk decay"),
        ({"loss": "ce"}, SAMPLED, {}, "ce decay"),
        ({"head_weights": "decay"}, SAMPLED, {}, "nla decay"),
        ({"head_weights": "acceptance"}, {}, {}, "ce acceptance"),
    ],
)
def test_heads_are_taught_for_the_drafts_that_decoding_makes(train_, decode, tree, expected):
    config = Config(
        train=TrainConfig(**train_), decode=DecodeConfig(**decode), tree=TreeConfig(**tree)
    )
    sections = config.train, config.decode, config.tree
    found = with_objective(*sections)
    assert f"{found.loss} {found.head_weights}" == expected
    before = with_objective(*sections, {"loss": "kl", "head_weights": "decay"})
    assert before.loss == (train_.get("loss") or "kl")
    assert with_objective(*sections, {"learning_rate": 1.0}) == found


@pytest.mark.parametrize(
    ("memory", "vocabulary", "loss", "rows"),
    [
        (None, 128_256, "ce", 256),
        (int(139.8 * GB), 32_000, "ce", 8192),
        (int(139.8 * GB), 128_256, "ce", 5888),
        (int(79.1 * GB), 128_256, "ce", 3328),
        (int(79.6 * GB), 128_256, "ce", 3328),  # another driver on the same device
        (int(79.1 * GB), 128_256, "kl", 1792),
        (int(23.6 * GB), 128_256, "ce", 1024),
        (int(11.6 * GB), 256_000, "kl", 256),
        (2 * GB, 1000, "ce", 8192),
    ],
)
def test_rows_of_a_chunk_by_memory(memory, vocabulary, loss, rows):
    assert chunk_rows(memory, vocabulary, loss) == rows


def test_what_is_automatic_and_what_is_not():
    def taken(memory, **settings):
        keys = {"vocabulary": 32_000, "trained": 10**9, "rate": 2e-3, "operations": 1e18}
        found = settle(
            with_objective(TrainConfig(**settings), DecodeConfig(), TreeConfig()),
            memory=memory,
            **keys,
        )
        return found.loss_chunk_rows, found.loss_form, found.compile

    assert taken(None) == (256, "at_once", "false")
    assert taken(None, accumulate=2)[1] == "recompute"
    assert taken(80 * GB) == (8192, "at_once", "true")
    # Gradients of two micro-batches at one time: 4 GB are within a sixteenth of 80, not of 24.
    assert taken(80 * GB, accumulate=2)[1] == "at_once"
    assert taken(24 * GB, accumulate=2)[1] == "recompute"
    assert taken(80 * GB, kind="medusa2")[2] == "false"
    assert taken(80 * GB, features="cache")[2] == "true"  # the loss
    explicit = {"loss_chunk_rows": 7, "loss_form": "recompute", "compile": "false"}
    assert taken(80 * GB, **explicit) == tuple(explicit.values())
    assert taken(None, compile=True) == (256, "at_once", "true")  # as YAML and Python say it
    small = {"vocabulary": 9, "rate": 2e-3}
    short = settle(
        with_objective(TrainConfig(), DecodeConfig(), TreeConfig()),
        memory=80 * GB,
        trained=1,
        operations=1e15,
        **small,
    )
    assert short.compile == "false"
    for memory, held, form in (
        (None, 3 * 10**8, "at_once"),  # a GB of gradients of what heads share may wait on a CPU
        (None, 5 * 10**8, "recompute"),
        (80 * GB, 14 * 10**8, "at_once"),
        (80 * GB, 16 * 10**8, "recompute"),
    ):
        shared = settle(
            with_objective(TrainConfig(), DecodeConfig(), TreeConfig()),
            memory=memory,
            trained=10**8,
            held=held,
            **small,
        )
        assert shared.loss_form == form


@pytest.mark.parametrize(
    ("size", "width", "scale", "tokens", "rate"),
    [
        (0.309, 64, 1.0, 2048, 1.5e-2),
        (0.0408, 640, 1.0, 2048, 6.5e-4),
        (0.0408, 640, 1.0, 8192, 1.3e-3),  # by the root of a step's tokens
        (0.0408, 640, 0.5, 2048, 3.2e-4),  # as if its logits' factor stood in the weights
        (0.001, 4096, 1.0, 2048, 1e-4),  # the least
        (0.5, 16, 1.0, 8192, 2e-2),  # the most
    ],
)
def test_the_learning_rate_follows_from_the_backbones_size(size, width, scale, tokens, rate):
    num_rows = 70_000 if width == 64 else 8  # read in three parts
    weight_VD = torch.zeros(num_rows, width)
    weight_VD[num_rows // 2 :] = -size * 2**0.5
    for dtype in (torch.float32, torch.bfloat16):
        lm_head = SimpleNamespace(weight=weight_VD.to(dtype))
        backbone = SimpleNamespace(lm_head=lm_head, logit_scale=scale)
        assert learning_rate(backbone, tokens) == pytest.approx(rate, rel=0.02)


def test_weights_that_cannot_be_read_have_the_usual_rate():
    lm_head = SimpleNamespace(weight=torch.zeros(4, 4, dtype=torch.uint8))
    assert learning_rate(SimpleNamespace(lm_head=lm_head, logit_scale=1.0), 2048) == 1e-3


def test_a_learning_rate_that_is_given_is_taken(config, tmp_path):
    config.train.max_steps = 1
    run(config, tmp_path / "by itself")
    found = settled(tmp_path / "by itself")["learning_rate"]
    config.train.accumulate = 4
    run(config, tmp_path / "larger steps")
    assert settled(tmp_path / "larger steps")["learning_rate"] == pytest.approx(2 * found, rel=0.05)
    config.train.learning_rate = 3e-3
    run(config, tmp_path / "given")
    assert settled(tmp_path / "given")["learning_rate"] == 3e-3


def test_a_resumed_training_takes_what_its_checkpoint_was_made_with(config, tmp_path, monkeypatch):
    """Here the machine becomes another one in between, and the rule of the rate another rule."""
    config.train.max_steps = 2
    monkeypatch.setattr(train, "gpu_memory", lambda device: 8 * GB)
    monkeypatch.setattr(train, "learning_rate", lambda backbone, tokens: 7e-3)
    run(config, tmp_path / "run")
    assert settled(tmp_path / "run") == {
        "loss": "ce",
        "head_weights": "decay",
        "learning_rate": 7e-3,
        "loss_chunk_rows": 8192,
        "loss_form": "at_once",
        "compile": "false",
    }
    monkeypatch.undo()
    run(config, tmp_path / "run")
    found = settled(tmp_path / "run")
    assert (found["loss_chunk_rows"], found["learning_rate"]) == (8192, 7e-3)
    config.train.resume = "never"
    run(config, tmp_path / "run")
    found = settled(tmp_path / "run")
    assert found["loss_chunk_rows"] == 256 and found["learning_rate"] != 7e-3


def test_a_resumed_training_keeps_its_loss(config, tmp_path):
    """Decoding at another temperature is no other training."""
    config.decode = DecodeConfig(rule="sampling")
    config.train.max_steps = 2
    metrics = run(config, tmp_path / "run")
    found = settled(tmp_path / "run")
    assert (found["loss"], found["head_weights"]) == ("nla", "acceptance")
    config.decode = DecodeConfig()
    assert run(config, tmp_path / "run")["train/loss"] == metrics["train/loss"]
    assert settled(tmp_path / "run") == found
    config.train.resume = "never"
    run(config, tmp_path / "run")
    assert settled(tmp_path / "run")["loss"] == "ce"


def test_a_cpu_that_goes_on_with_a_training_of_a_gpu_compiles_nothing(
    config, tmp_path, monkeypatch
):
    config.train.max_steps = 2
    monkeypatch.setattr(train, "gpu_memory", lambda device: 8 * GB)
    monkeypatch.setattr(defaults, "_COMPILED_OPERATIONS", 0.0)
    calls = []
    compiled = lambda *given: calls.append(1) or nullcontext()  # noqa: E731
    monkeypatch.setattr(train.MedusaModule, "compiled", compiled)
    run(config, tmp_path / "run")
    monkeypatch.setattr(train, "gpu_memory", lambda device: None)
    run(config, tmp_path / "run")
    assert settled(tmp_path / "run")["compile"] == "true" and not calls
    config.train.compile = "true"
    run(config, tmp_path / "run")
    assert calls


def test_what_was_taken_is_said_and_noted(config, tmp_path, caplog):
    caplog.set_level("INFO")
    config.train.max_steps = 1
    (tmp_path / "run").mkdir()
    session = train.Session(config, tmp_path / "run")
    train.run(config, tmp_path / "run", session)
    assert session.notes.entry["settled"]["loss_chunk_rows"] == 256
    json.dumps(session.notes.entry["settled"])
    assert "loss in chunks of at most 256 rows, gradients with the loss" in caplog.text


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # by torch itself
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # that torch asks for, too
@pytest.mark.parametrize(
    ("backend", "loss", "form"),
    [("eager", "ce", "at_once"), ("eager", "nla", "recompute"), ("broken", "ce", "at_once")],
)
def test_a_compiled_training_is_the_same(
    config, tmp_path, monkeypatch, caplog, backend, loss, form
):
    """Where torch cannot compile, lines say so, and the training runs as it is."""
    config.train.max_steps, config.dtype.precision = 3, "32-true"
    config.train.loss, config.train.loss_form = loss, form
    plain = run(config, tmp_path / "plain")
    graphs = {"layers": [], "loss": []}

    def chosen(of, graph, inputs):
        if backend == "broken":
            raise RuntimeError("there is no compiler")
        graphs[of].append(graph)
        return graph

    compiled, of_layers = defaults.Backbone.compiled, partial(chosen, "layers")
    monkeypatch.setattr(defaults.Backbone, "compiled", lambda self: compiled(self, of_layers))
    of_loss = partial(loss_module.compiled_loss, backend=partial(chosen, "loss"))
    monkeypatch.setattr(loss_module, "compiled_loss", of_loss)
    config.train.compile = "true"
    found = run(config, tmp_path / "compiled")
    exact = plain["train/loss"]
    assert found["train/loss"] == (exact if loss == "ce" else pytest.approx(exact, rel=1e-6))
    assert len(graphs["loss"]) == bool(graphs["layers"]) == (backend == "eager")
    for said in ("torch compiles no layer here", "torch cannot compile the loss"):
        assert (said in caplog.text) == (backend == "broken")


def test_a_model_without_a_list_of_layers_runs_as_it_is(caplog):
    def compiled():
        raise UserError("it has no list of its 2 layers.")

    backbone = SimpleNamespace(compiled=compiled)
    with defaults.compiled_backbone(backbone, None) as is_compiled:
        assert not is_compiled
    assert "it has no list of its 2 layers" in caplog.text


def test_an_old_training_goes_on_with_its_loss(config, tmp_path):
    """Its checkpoint names none: there was no choice but that of the config."""
    config.decode = DecodeConfig(rule="sampling")
    config.train.max_steps = 2
    config.train.loss, config.train.head_weights = "ce", "decay"
    metrics = run(config, tmp_path / "run")
    path = tmp_path / "run/checkpoints/last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    for name in ("loss", "head_weights"):
        del checkpoint["settled"][name]
    torch.save(checkpoint, path)
    seals.seal(path)
    config.train.loss = config.train.head_weights = "auto"
    assert run(config, tmp_path / "run")["train/loss"] == metrics["train/loss"]


def test_only_a_loss_that_reads_the_backbone_counts_its_lm_head(config):
    """Of the share of the matrix rate: an automatic loss is what it becomes."""
    config.train.features = "cache"
    backbone = SimpleNamespace(config=None)
    asked = []
    for name in ("ce", "auto", "nla"):
        config.train.loss = name
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train.Operations, "of", lambda *given, **more: asked.append(more))
            train.operations_of(
                with_objective(config.train, config.decode, config.tree), backbone, None
            )
    assert [more["asks_lm_head"] for more in asked] == [False, False, True]
