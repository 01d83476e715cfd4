"""What only a CUDA device can show of the kernels; `nox -s gpu` runs it."""

import pytest
import torch
from kernel_cases import RULES, exact_cases, is_borderline, make_case
from kernel_checks import assert_equal

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def kernels():
    from medusa_exp.decode.cuda.runtime import CupyKernels

    return CupyKernels(torch.device("cuda"))


def on_cpu(verdict):
    return type(verdict)(
        verdict.path_BL.cpu(), verdict.num_accepted_B.cpu(), verdict.next_token_B.cpu()
    )


def test_the_kernels_are_right_on_the_device(kernels):
    from gpu_checks import check_step, check_verification

    found = check_verification(kernels, 40)
    assert found["mismatches"] == [] and found["compared"] > 500
    assert check_step(kernels) == "equal"


@pytest.mark.parametrize("rule", RULES)
def test_a_captured_call_judges_what_is_there_when_it_is_replayed(kernels, rule):
    from gpu_checks import moved, plans_of

    from medusa_exp.decode.cuda.verify import KernelVerify

    cases = [make_case(seed, rule, vocab=1000, nodes=9) for seed in range(40)]
    first, *others = (
        case
        for case in cases
        if not is_borderline(case)
        and case.logits_BNV.shape == (2, 9, 1000)
        and (case.logits_BNV.dtype, "max_depth" in case.options) == (torch.bfloat16, False)
        and case.options.get("temperature", 1.0) == cases[0].options.get("temperature", 1.0)
    )
    for plan in plans_of(kernels):
        case, verifier = moved(first, kernels.device), KernelVerify(kernels, plan)

        def call(case=case, verifier=verifier):
            return verifier(
                case.logits_BNV, case.tokens_BN, case.parents_BN, rule=rule, **case.options
            )

        call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            verdict = call()
        for other in (first, *others):
            if {"epsilon", "alpha"} & set(other.options) and any(
                other.options[key] != first.options[key] for key in ("epsilon", "alpha")
            ):
                continue
            there = moved(other, kernels.device)
            for name in ("logits_BNV", "tokens_BN", "parents_BN"):
                getattr(case, name).copy_(getattr(there, name))
            if rule == "sampling":
                case.options["uniforms_BN"].copy_(there.options["uniforms_BN"])
            graph.replay()
            graph.replay()
            assert_equal(on_cpu(verdict), other.expected())


def test_a_call_follows_torch_to_another_stream(kernels):
    from gpu_checks import moved

    from medusa_exp.decode.cuda.verify import KernelVerify

    [case] = exact_cases("greedy")
    there, verifier = moved(case, kernels.device), KernelVerify(kernels)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        there.logits_BNV[:, 0, 5] = 9.0  # after which node 1 is right
        verdict = verifier(there.logits_BNV, there.tokens_BN, there.parents_BN)
        path = verdict.path_BL.tolist()
    assert path == [[0, 1, -1, -1]]
