from inspect import signature

import architectures
import pytest
import torch
from tiny_models import ARCHITECTURES, build_model
from torch._dynamo.testing import CompileCounter
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    GPTJPreTrainedModel,
    LlamaForCausalLM,
)

from medusa_exp.config import ModelConfig
from medusa_exp.decode import generate
from medusa_exp.decode.compatibility import check_tree_attention
from medusa_exp.errors import UserError
from medusa_exp.model import Backbone, build_heads, load_backbone
from medusa_exp.model.source import ModelSpec
from medusa_exp.runs.machine import pick_device
from medusa_exp.tree import Tree


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_hidden_states_are_what_the_lm_head_reads(architecture):
    backbone = Backbone(build_model(architecture))
    ids_BT = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        logits_BTV = backbone.lm_head(backbone.hidden_states(ids_BT))
        expected_BTV = backbone.model(ids_BT).logits
    same = logits_BTV.argmax(-1) == expected_BTV.argmax(-1)  # Gemma 2 caps logits afterwards
    assert same.all()


def test_identity_is_the_same_in_every_dtype():
    identities = {
        Backbone(build_model("llama", dtype=dtype)).identity()
        for dtype in (torch.float32, torch.bfloat16)
    }
    assert len(identities) == 1
    assert Backbone(build_model("llama", seed=1)).identity() not in identities


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_autocast_to_the_other_half_type_leaves_hidden_states_as_they_are(architecture):
    backbone, ids_BT = Backbone(build_model(architecture)), torch.tensor([[3, 1, 4, 1, 5]])
    for own, autocast in ((torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16)):
        backbone.model.to(own)
        expected_BTD = backbone.hidden_states(ids_BT)
        with torch.autocast("cpu", autocast):
            assert torch.equal(backbone.hidden_states(ids_BT), expected_BTD)


def test_wrapping_a_model_changes_nothing_about_it():
    model = build_model("llama").train()
    Backbone(model)
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_hidden_states_pass_their_check(architecture):
    Backbone(build_model(architecture)).check_hidden_states()


def test_a_model_that_bends_its_states_before_its_lm_head_is_refused():
    backbone = Backbone(build_model("llama"))
    backbone.lm_head.register_forward_pre_hook(lambda _, inputs: (inputs[0].tanh(),), prepend=True)
    with pytest.raises(UserError, match="is not its last hidden state"):
        backbone.check_hidden_states()


def spec_for(path):
    return ModelSpec(ModelConfig(path=str(path)))


@pytest.fixture
def model_dir(tmp_path, tokenizer):
    model = build_model("llama")
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_loads_a_directory_frozen(model_dir):
    parameters = load_backbone(spec_for(model_dir)).model.parameters()
    assert not any(parameter.requires_grad for parameter in parameters)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "config.json").unlink(), "has no config.json"),
        (lambda d: (d / "config.json").write_text("{}"), "cannot be loaded"),
        (lambda d: (d / "model.safetensors").unlink(), "cannot be loaded"),
        (lambda d: (d / "model.safetensors").write_bytes(b"{}"), "was cut off"),
    ],
    ids=["no config", "empty config", "no weights", "broken weights"],
)
def test_directories_that_hold_no_model(model_dir, spoil, message):
    spoil(model_dir)
    with pytest.raises(UserError, match=message) as caught:
        load_backbone(spec_for(model_dir))
    assert str(model_dir) in str(caught.value)


@pytest.fixture
def without_sdpa(monkeypatch):
    """Let GPT-J have no sdpa attention: it had none until transformers 5.24."""
    monkeypatch.setattr(GPTJPreTrainedModel, "_supports_sdpa", False)


def test_a_model_without_sdpa_gets_eager_attention(tmp_path, caplog, without_sdpa):
    architectures.build("gptj", architectures.ROTARY).save_pretrained(tmp_path / "model")
    caplog.set_level("INFO")
    spec = spec_for(tmp_path / "model")

    for _ in range(2):
        backbone = load_backbone(spec)

    assert backbone.model.config._attn_implementation == "eager"
    check_tree_attention(backbone)
    assert caplog.text.count("has no sdpa attention: eager is used") == 1


def test_who_names_sdpa_gets_no_other_attention(tmp_path, model_dir, without_sdpa):
    architectures.build("gptj", architectures.ROTARY).save_pretrained(tmp_path / "gptj")
    wanted = {"attn_implementation": "sdpa"}

    with pytest.raises(UserError, match=r"Set model\.attn_implementation=auto, or eager"):
        load_backbone(ModelSpec(ModelConfig(path=str(tmp_path / "gptj"), **wanted)))

    for settings in ({}, wanted):  # the same model, and the same keys
        spec = ModelSpec(ModelConfig(path=str(model_dir), **settings))
        assert load_backbone(spec).model.config._attn_implementation == spec.attention == "sdpa"


def test_paths_that_lead_nowhere(tmp_path):
    with pytest.raises(UserError, match="there is no such directory"):
        load_backbone(spec_for(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"model\.path is not set"):
        load_backbone(ModelSpec(ModelConfig()))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_no_cuda_here():
    with pytest.raises(UserError, match="device=cuda"):
        pick_device("cuda")


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_compiled_it_gives_the_same_hidden_states(architecture):
    backbone = Backbone(build_model(architecture))
    rows = [torch.randint(0, 64, (2, length)) for length in (11, 24, 40)]
    positions = [torch.arange(len(ids_BT[0])).expand(2, -1) for ids_BT in rows]
    expected = [backbone.hidden_states(*given) for given in zip(rows, positions, strict=True)]

    compiled = CompileCounter()
    with torch.no_grad(), backbone.compiled(backend=compiled):
        for given, hidden_BTD in zip(zip(rows, positions, strict=True), expected, strict=True):
            assert torch.equal(backbone.hidden_states(*given), hidden_BTD)
    assert backbone.num_layers > compiled.frame_count == 1  # for all layers and lengths
    assert all(layer._compiled_call_impl is None for layer in backbone.layers())


class TwoCaches(LlamaForCausalLM):
    """Has code of its own: keeps keys and values as before transformers 5.24, and beside them
    something else that it calls a cache."""

    def forward(self, input_ids=None, past_key_values=None, cache=None, **options):
        assert cache is None
        own = "cache" if "cache" in signature(super().forward).parameters else "past_key_values"
        return super().forward(input_ids, **{own: past_key_values}, **options)


def test_a_model_that_takes_something_else_called_cache_is_decoded():
    backbone = Backbone(TwoCaches(build_model("llama").config).eval())
    check_tree_attention(backbone)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
def test_a_wrapped_model_is_given_its_cache_by_the_name_of_what_it_wraps():
    from peft import LoraConfig, get_peft_model

    model = build_model("llama")
    own = Backbone(model)._cache_argument
    wrapped = Backbone(get_peft_model(model, LoraConfig(target_modules=["q_proj"])))
    assert wrapped._cache_argument == own
    check_tree_attention(wrapped)


TEXT_MODEL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
VISION = {"intermediate_size": 48, "num_attention_heads": 4, "image_size": 16, "patch_size": 8}
EYES = {**VISION, "hidden_size": 32, "num_hidden_layers": 1}
QWEN_EYES = {"hidden_size": 32, "out_hidden_size": 32, "depth": 1, "num_heads": 4}
TURNED = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
PICTURED = {
    "gemma3": {"text_config": {**TEXT_MODEL, "head_dim": 8}, "vision_config": EYES},
    "mistral3": {
        "text_config": {**TEXT_MODEL, "head_dim": 8, "model_type": "mistral"},
        "vision_config": {**EYES, "model_type": "pixtral"},
    },
    "qwen2_5_vl": {
        "text_config": {**TEXT_MODEL, "rope_parameters": TURNED},
        "vision_config": QWEN_EYES,
    },
}


def pictured(path, name):
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(name, **PICTURED[name]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)  # else it says the same whatever it is asked
    model.save_pretrained(path)
    return model.eval()


@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize("name", PICTURED)
def test_of_a_model_for_pictures_the_text_path_is_taken(tmp_path, name):
    model = pictured(tmp_path / name, name)
    backbone = load_backbone(spec_for(tmp_path / name))
    backbone.check_next_logits()
    ids_1T = torch.tensor([[5, 9, 4, 31, 7]])
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    said_1T = model.generate(ids_1T, attention_mask=torch.ones_like(ids_1T), **options)
    heads, tree = build_heads(backbone, num_heads=2), Tree.from_paths([[0], [1], [0, 0]])
    found = generate(backbone, heads, ids_1T, tree=tree, max_new_tokens=8)
    assert found.sequences == [said_1T[0, 5:].tolist()]


def test_a_body_that_gives_no_hidden_states_is_refused(monkeypatch):
    backbone = Backbone(build_model("llama"))
    monkeypatch.setattr(backbone, "body", backbone.model)  # as BLIP-2's is a whole language model
    with pytest.raises(UserError, match=r"gives no hidden states .*last_hidden_state"):
        backbone.check_hidden_states()
