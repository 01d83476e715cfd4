"""What only a CUDA device can show of the kernels; `nox -s gpu` runs it."""

import pytest
import torch
from kernel_cases import KERNELS, cases_alike, exact_cases
from kernel_checks import assert_equal
from kernel_device import compare_step, compare_verification, configs_of, moved

from medusa_exp.decode.cuda.verify import KernelVerify

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
    found = compare_verification(kernels, 40)
    assert found["mismatches"] == [] and found["compared"] > 500
    assert compare_step(kernels) == "equal"


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_captured_call_judges_what_is_there_when_it_is_replayed(kernels, kernel):
    first, *others = cases_alike(kernel, 4)
    for config in configs_of(kernels):
        case, verifier = moved(first, kernels.device), KernelVerify(kernels, config)

        def call(case=case, verifier=verifier):
            return verifier(
                case.logits_BNV, case.tokens_BN, case.parents_BN, rule=case.rule, **case.options
            )

        call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            verdict = call()
        for other in (first, *others):
            there = moved(other, kernels.device)
            for name in ("logits_BNV", "tokens_BN", "parents_BN"):
                getattr(case, name).copy_(getattr(there, name))
            if "uniforms_BN" in case.options:
                case.options["uniforms_BN"].copy_(there.options["uniforms_BN"])
            if "drawn" in case.options:
                case.options["drawn"].q_BQW.copy_(there.options["drawn"].q_BQW)
            graph.replay()
            graph.replay()
            assert_equal(on_cpu(verdict), other.expected())


def test_a_call_follows_torch_to_another_stream(kernels):
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
