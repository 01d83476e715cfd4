"""Who judges: torch, or the kernels; and what the kernels refuse. Without a GPU.

Whether the kernels judge rightly is tested in tests/kernels.
"""

import numpy as np
import pytest
import torch

from medusa_exp.decode import rule
from medusa_exp.decode.cpu_verify import verify_on_cpu
from medusa_exp.decode.cuda.filter import filter_config
from medusa_exp.decode.cuda.launch import LaunchConfig, launch_config
from medusa_exp.decode.cuda.verify import ARGUMENTS, KernelVerify, can_verify
from medusa_exp.decode.rule import AcceptanceRule, Verifier, pick_verify
from medusa_exp.decode.sampled import Drawn
from medusa_exp.decode.verify import verify
from medusa_exp.errors import UserError

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


class RecordingKernels:
    """Notes launches, and writes a verdict as kernels do: by address."""

    device = CPU
    num_processors = 132
    has_clusters = True

    def __init__(self):
        self.launches = []

    def launch(self, file, defines, entry, grid, threads, arguments):
        self.launches.append((file, defines, entry, grid, threads, arguments[0].copy()))


@pytest.fixture
def kernels():
    return RecordingKernels()


def arguments(**changed):
    """Return good arguments for KernelVerify, some changed."""
    return {
        "logits_BNV": torch.zeros(2, 3, 5),
        "tokens_BN": torch.zeros(2, 3, dtype=torch.long),
        "parents_BN": torch.tensor([[-1, 0, 0]]).expand(2, -1),
        "rule": "sampling",
        "uniforms_BN": torch.zeros(2, 3),
    } | changed


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("rule", "nucleus", "use one of"),
        ("temperature", 0.0, "temperature above 0"),
        ("max_depth", -1, "at least 0"),
        ("logits_BNV", torch.zeros(2, 3, 5).double(), "float32, float16 or bfloat16"),
        ("logits_BNV", torch.zeros(2, 3), r"must be \[B, N, V\]"),
        ("logits_BNV", torch.zeros(2, 0, 5), r"must be \[B, N, V\]"),
        ("logits_BNV", torch.zeros(2, 5, 3).transpose(1, 2), "contiguous along V"),
        ("logits_BNV", torch.zeros(2, 257, 5), "at most 65535 sequences of 256 nodes"),
        ("logits_BNV", torch.zeros(2, 3, 5, device="meta"), "on meta, the kernels on cpu"),
        ("tokens_BN", torch.zeros(2, 3), "tokens_BN is torch.float32"),
        ("tokens_BN", torch.zeros(2, 4).long(), r"tokens_BN .* must have \[2, 3\]"),
        ("tokens_BN", torch.zeros(3, 2).long().T, "tokens_BN must be contiguous"),
        ("tokens_BN", torch.zeros(2, 3, device="meta").long(), "tokens_BN is on meta"),
        ("parents_BN", torch.zeros(2, 3).int(), "parents_BN is torch.int32"),
        ("uniforms_BN", torch.zeros(2, 3).double(), "uniforms_BN is torch.float64"),
        ("uniforms_BN", torch.zeros(2, 2), "uniforms_BN has shape"),
        ("uniforms_BN", None, "needs uniforms_BN"),
    ],
)
def test_wrong_arguments_are_refused_and_never_launched(kernels, name, value, message):
    with pytest.raises(ValueError, match=message):
        KernelVerify(kernels)(**arguments(**{name: value}))
    assert kernels.launches == []


def drawn(**changed):
    """Return what three nodes were drawn from, of five tokens or some."""
    return Drawn(
        **{"q_BQW": torch.zeros(2, 2, 5), "q_index": (1, 0, 0), "children": ((1, 2), (), ())}
        | changed
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q_BQW": torch.zeros(2, 2, 5).double()}, "q_BQW is torch.float64"),
        ({"q_BQW": torch.zeros(1, 2, 5)}, r"must be \[2, Q, 5\]"),
        ({"q_BQW": torch.zeros(2, 5)}, "q_BQW has shape .* three dimensions"),
        ({"token_map": torch.tensor([4, 1])}, r"must be \[2, Q, 2\]"),
        ({"q_BQW": torch.zeros(2, 5, 2).transpose(1, 2)}, "q_BQW must be contiguous along"),
        ({"q_BQW": torch.zeros(2, 2, 5, device="meta")}, "on meta"),
        ({"q_index": (2, 0, 0)}, "one of 2 distributions for each of 3 nodes"),
        ({"q_index": (0, 0)}, "one of 2 distributions for each of 3 nodes"),
    ],
)
def test_wrong_draws_are_refused_and_never_launched(kernels, changed, message):
    with pytest.raises(ValueError, match=message):
        KernelVerify(kernels)(**arguments(drawn=drawn(**changed)))
    assert kernels.launches == []


def test_what_the_kernel_of_drawn_drafts_is_told(kernels):
    verifier_, wide = KernelVerify(kernels), torch.zeros(2, 3, 6)[:, 1:, 4:]
    some = drawn(q_BQW=wide, token_map=torch.tensor([4, 1]))
    given = arguments(drawn=some, uniforms_BN=torch.zeros(2, 7))
    verifier_(**given)
    verifier_(**given)
    verifier_(**arguments(drawn=drawn()))
    verifier_(**arguments(drawn=some, rule="greedy"))
    files = [launch[0] for launch in kernels.launches]
    assert files == ["traversal.cu", "traversal.cu", "traversal.cu", "greedy.cu"]
    told, again, whole, greedy = (launch[-1] for launch in kernels.launches)
    assert told == again  # nothing was allocated anew
    assert told["q"] == wide.data_ptr()
    assert (told["q_stride_b"], told["q_stride_q"], told["uniforms_stride_b"]) == (18, 6, 7)
    [few, all_] = verifier_._tables.values()
    assert few.places_V.tolist() == [-1, 1, -1, -1, 0]
    assert told["places"] == few.places_V.data_ptr() and whole["places"] == 0
    assert few.q_index_N.tolist() == [1, 0, 0]
    assert told["q_index"] == few.q_index_N.data_ptr() != all_.q_index_N.data_ptr()
    assert greedy["q"] == greedy["uniforms"] == 0


def test_what_the_kernels_are_told(kernels):
    given = arguments(temperature=0.5, max_depth=1)
    given["logits_BNV"] = torch.zeros(2, 4, 8, dtype=torch.bfloat16)[:, 1:, 2:7]
    verdict = KernelVerify(kernels, LaunchConfig(2, threads=64))(**given)
    [(file, defines, entry, grid, threads, told)] = kernels.launches
    assert (file, defines, entry) == ("sampling.cu", ("LOGIT_BFLOAT16",), "verify_2")
    assert (grid, threads) == ((2, 1, 2), 64)
    assert told["logits"] == given["logits_BNV"].data_ptr()
    assert (told["logits_stride_b"], told["logits_stride_n"]) == (32, 8)
    assert (told["tokens_stride_b"], told["parents_stride_b"]) == (3, 0)
    assert (told["num_nodes"], told["vocab_size"], told["path_length"]) == (3, 5, 2)
    assert told["scale"] == pytest.approx(2 / np.log(2))
    assert told["path"] == verdict.path_BL.data_ptr() and verdict.path_BL.shape == (2, 2)
    assert told["next_token"] == verdict.next_token_B.data_ptr()


def test_nothing_is_allocated_by_the_second_call_of_a_shape(kernels):
    verifier_ = KernelVerify(kernels)
    first = verifier_(**arguments())
    again = verifier_(**arguments(logits_BNV=torch.ones(2, 3, 5)))
    assert again.path_BL.data_ptr() == first.path_BL.data_ptr()
    one, two = (launch[-1] for launch in kernels.launches)
    same = [name for name in ARGUMENTS.names if one[name] == two[name]]
    assert {"path", "num_accepted", "next_token"} <= set(same)


def test_long_rows_have_more_blocks_while_there_are_processors_for_them(kernels):
    for batch, vocab, cluster in (
        (1, 32000, 2),
        (64, 32000, 2),
        (1, 128256, 8),
        (16, 128256, 8),
        (17, 128256, 2),
        (64, 151936, 2),
    ):
        assert launch_config(batch, 2 * vocab, kernels) == LaunchConfig(cluster, threads=512)
    kernels.has_clusters = False
    assert launch_config(8, 2 * 128256, kernels) == LaunchConfig(1, threads=1024)


@pytest.mark.parametrize(
    "config",
    [LaunchConfig(threads=48), LaunchConfig(threads=2048), LaunchConfig(3), LaunchConfig(0)],
)
def test_launches_that_the_kernels_would_not_survive(kernels, config):
    with pytest.raises(ValueError, match="LaunchConfig"):
        KernelVerify(kernels, config)(**arguments())
    kernels.has_clusters = False
    with pytest.raises(ValueError, match="sm_90"):
        KernelVerify(kernels, LaunchConfig(2))(**arguments())
    assert kernels.launches == []


def test_on_the_cpu_auto_walks_on_the_host():
    assert pick_verify("auto", CPU) is verify_on_cpu
    assert pick_verify("torch", CPU) is verify
    assert pick_verify("torch", CUDA) is verify
    assert Verifier(AcceptanceRule(), CPU)._verify is verify_on_cpu


@pytest.mark.parametrize("options", [{"top_k": 3}, {"top_p": 0.5}, {"top_k": 3, "top_p": 0.5}])
def test_filters_come_before_verification(kernels, options):
    KernelVerify(kernels)(**arguments(**options, temperature=0.5))
    of_filter, verification = kernels.launches
    assert of_filter[:4] == ("filter.cu", ("LOGIT_FLOAT32",), "filter_1", (1, 3, 2))
    told = of_filter[-1]
    assert (told["top_k"], told["top_p"]) == (options.get("top_k", 0), options.get("top_p", 1.0))
    assert told["scale"] == verification[-1]["scale"]
    assert told["filtered"] == verification[-1]["logits"] != told["logits"]
    KernelVerify(kernels)(**arguments(**options, rule="greedy"))
    assert [launch[0] for launch in kernels.launches[2:]] == ["greedy.cu"]


def test_auto_uses_the_kernels_where_they_can(monkeypatch, kernels):
    monkeypatch.setattr(rule, "find_spec", lambda name: name)
    monkeypatch.setattr(rule, "kernels_on", lambda device: kernels)
    judge = pick_verify("auto", CUDA)
    judge(**arguments())
    assert len(kernels.launches) == 1
    odd = torch.zeros(2, 3, 5).double()
    assert not can_verify(odd)
    judge(**arguments(logits_BNV=odd))
    assert len(kernels.launches) == 1
    judge(**arguments(drawn=drawn()))
    assert len(kernels.launches) == 2
    wide = drawn(q_BQW=torch.full((2, 2, 5), 0.2).double())
    assert not can_verify(torch.zeros(2, 3, 5), wide)
    judge(**arguments(drawn=wide))
    assert len(kernels.launches) == 2
    monkeypatch.setattr(rule, "find_spec", lambda name: None)
    assert pick_verify("auto", CUDA) is verify


def test_cupy_that_cannot_be_had_is_named():
    with pytest.raises(UserError, match="CUDA device"):
        pick_verify("cupy", CPU)
    with pytest.raises(ValueError, match="verifier=numba"):
        AcceptanceRule(verifier="numba")


@pytest.mark.parametrize(
    ("rows", "vocab", "cluster"),
    [(1, 300, 1), (1, 32000, 4), (16, 128256, 8), (64, 128256, 4), (1088, 128256, 1)],
)
def test_rows_to_be_filtered_fill_the_device(kernels, rows, vocab, cluster):
    assert filter_config(rows, vocab, kernels) == LaunchConfig(cluster, 512)
    kernels.has_clusters = False
    assert filter_config(rows, vocab, kernels) == LaunchConfig()
