import logging

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from medusa_exp.decode import memory
from medusa_exp.decode.decoder import Decoder
from medusa_exp.decode.loop import Limits
from medusa_exp.decode.rule import AcceptanceRule
from medusa_exp.decode.step import CapturedStep
from medusa_exp.errors import UserError
from medusa_exp.evaluate.methods import build_methods, hf_generate, timed
from medusa_exp.model import Backbone, build_heads
from medusa_exp.tree import chain

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 3, 1, 4, 1, 5, 9, 2, 6]
BASELINES = ["chain", "hf_generate", "prompt_lookup"]


def methods_of(backbone, limits, rule=None, baselines=BASELINES, batch_size=1, **options):
    heads = build_heads(backbone, num_heads=2)
    decoder = Decoder(backbone, heads, chain(1), rule or AcceptanceRule(), limits=limits, **options)
    return build_methods(decoder, baselines=baselines, batch_size=batch_size, longest=len(PROMPT))


def test_all_methods_say_the_same_and_count_their_steps(backbone):
    methods = methods_of(backbone, Limits(30, {7}))
    answers = {
        name: timed(method, [PROMPT], torch.device("cpu"))[0][0] for name, method in methods.items()
    }
    assert list(answers) == ["plain", "tree", "chain", "hf_generate", "prompt_lookup"]
    plain = answers["plain"]
    assert plain.num_steps == len(plain.tokens) == answers["hf_generate"].num_steps
    for answer in answers.values():
        assert answer.tokens == plain.tokens
        assert answer.num_steps <= plain.num_steps
        if answer.accept_lengths is not None:
            assert len(answer.accept_lengths) == answer.num_steps
            assert sum(answer.accept_lengths) == len(answer.tokens)


def test_prompt_lookup_is_left_out_where_a_state_cannot_be_cut_back(caplog):
    caplog.set_level(logging.INFO)
    shape = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "eos_token_id": None}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **shape)).eval()
    methods = methods_of(Backbone(model), Limits(6))
    answers = {name: method([PROMPT])[0].tokens for name, method in methods.items()}
    assert list(answers) == ["plain", "tree", "chain", "hf_generate"]
    assert len({tuple(tokens) for tokens in answers.values()}) == 1
    assert "prompt_lookup is left out: MambaForCausalLM has recurrent layers" in caplog.messages


def test_what_runs_in_batches(backbone):
    methods = methods_of(backbone, Limits(10), batch_size=2)
    assert list(methods) == ["plain", "tree", "chain"]
    prompts = [PROMPT, PROMPT[:3]]
    plain, tree, over_chain = (
        [answer.tokens for answer in method(prompts)] for method in methods.values()
    )
    assert plain == tree == over_chain


def test_no_step_is_made_again_while_methods_are_timed(backbone, monkeypatch):
    """Of the larger trees the first calls come last: there is room for them from the start."""
    made = []
    init = CapturedStep.__init__

    def notes(step, *arguments, **options):
        made.append(step)
        init(step, *arguments, **options)

    monkeypatch.setattr(CapturedStep, "__init__", notes)
    methods = methods_of(backbone, Limits(5), batch_size=2, cuda_graph=True)
    for method in methods.values():
        method([PROMPT, PROMPT[:3]])
    warm = len(made)
    assert warm == 2 * len(methods)  # of two rows and of one
    for method in methods.values():
        method([PROMPT, PROMPT[:3]])
    assert len(made) == warm


def test_many_prompts_share_the_seconds_of_their_steps(backbone):
    methods = methods_of(backbone, Limits(10, {7}), batch_size=3)
    prompts = [PROMPT[number:] for number in range(8)]
    for method in methods.values():
        found, seconds = timed(method, prompts, torch.device("cpu"))
        shares = [answer.seconds for answer in found]
        assert all(share > 0 for share in shares)
        assert 0.5 * seconds < sum(shares) <= seconds


def test_a_batch_without_room_is_refused(backbone, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10_000_000)
    with pytest.raises(UserError, match=r"evaluate\.batch_sizes: 64 prompts .* room for \d+:"):
        methods_of(backbone, Limits(10), batch_size=64)


def test_a_lossy_rule_is_held_against_plain_greedy_decoding(backbone):
    greedy = methods_of(backbone, Limits(20))["plain"]([PROMPT])
    lossy = methods_of(backbone, Limits(20), AcceptanceRule("typical"))
    assert list(lossy) == ["plain", "tree", "chain"]
    assert lossy["plain"]([PROMPT]) == greedy


def test_a_models_own_wish_to_sample_is_not_heard(backbone):
    backbone.model.generation_config.update(do_sample=True, temperature=9.0, repetition_penalty=2.0)
    [greedy] = methods_of(backbone, Limits(12))["plain"]([PROMPT])
    assert hf_generate(backbone, PROMPT, max_new_tokens=12, stop_ids=()).tokens == greedy.tokens
