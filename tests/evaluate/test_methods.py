import torch

from medusa_exp.evaluate.methods import build_methods, hf_generate, timed
from medusa_exp.model import build_heads
from medusa_exp.tree import chain

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 3, 1, 4, 1, 5, 9, 2, 6]


def test_all_methods_say_the_same_and_count_their_steps(backbone):
    heads = build_heads(backbone, num_heads=2)
    methods = build_methods(
        backbone,
        heads,
        chain(2),
        max_new_tokens=30,
        stop_ids={7},
        baselines=["hf_generate", "prompt_lookup"],
    )
    answers = {
        name: timed(method, PROMPT, torch.device("cpu"))[0] for name, method in methods.items()
    }
    assert list(answers) == ["plain", "tree", "hf_generate", "prompt_lookup"]
    plain = answers["plain"]
    assert plain.num_steps == len(plain.tokens) == answers["hf_generate"].num_steps
    for answer in answers.values():
        assert answer.tokens == plain.tokens
        assert answer.num_steps <= plain.num_steps
        if answer.accept_lengths is not None:
            assert len(answer.accept_lengths) == answer.num_steps
            assert sum(answer.accept_lengths) == len(answer.tokens)


def test_a_models_own_wish_to_sample_is_not_heard(backbone):
    backbone.model.generation_config.update(do_sample=True, temperature=9.0, repetition_penalty=2.0)
    greedy = build_methods(backbone, None, chain(0), max_new_tokens=12, stop_ids=(), baselines=[])[
        "plain"
    ](PROMPT)
    assert hf_generate(backbone, PROMPT, max_new_tokens=12, stop_ids=()).tokens == greedy.tokens
