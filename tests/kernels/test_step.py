"""The kernels around the backbone against the torch code that they stand in for."""

import pytest
import torch
from kernel_checks import (
    COMMITS,
    check_commit,
    check_commit_within,
    check_draws,
    check_mask,
    mask_cases,
)
from kernel_shim import ORDERS

from medusa_exp.decode.cuda.draws import KernelDraw
from medusa_exp.decode.cuda.mask_and_commit import CacheCommit, build_mask


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_the_mask_is_that_of_torch(shim, architecture, order):
    check_mask(shim, mask_cases(architecture, range(12)), order)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("dtype", "head", "unit"), COMMITS)
def test_the_commit_is_that_of_the_cache(shim, dtype, head, unit, order):
    shim.order = order
    for seed in range(10):
        check_commit(shim, dtype, head, unit, seed)


@pytest.mark.parametrize("order", ORDERS)
def test_draws_are_those_of_torch(shim, order):
    shim.order = order
    check_draws(shim, range(120))


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-24])
def test_a_token_without_probability_is_not_drawn_while_others_have_some(shim, uniform):
    q_BMW = torch.zeros(1, 1, 600)
    q_BMW[..., [70, 71, 500]] = torch.tensor([1e-20, 1.0, 1e-20])
    tokens_BMR = KernelDraw(shim)(q_BMW, torch.full((1, 1, 5), uniform))
    assert sorted(tokens_BMR[0, 0, :3].tolist()) == [70, 71, 500]
    assert tokens_BMR[0, 0, 3:].tolist() == [599, 599]
    nothing_BMW = torch.full((1, 1, 40), float("nan"))
    assert KernelDraw(shim)(nothing_BMW, torch.full((1, 1, 2), uniform)).tolist() == [[[39, 39]]]


def test_what_cannot_be_drawn(shim):
    q_BMW, uniforms_BMR = torch.full((2, 3, 8), 1 / 8), torch.zeros(2, 3, 4)
    kernel = KernelDraw(shim)
    assert kernel(q_BMW, uniforms_BMR).tolist() == [[[0, 1, 2, 3]] * 3] * 2
    for q, uniforms, message in (
        (q_BMW.double(), uniforms_BMR, "q_BMW is torch.float64"),
        (q_BMW[0], uniforms_BMR, "three dimensions"),
        (q_BMW.transpose(1, 2), uniforms_BMR, "contiguous"),
        (q_BMW, uniforms_BMR.half(), "uniforms_BMR is torch.float16"),
        (q_BMW, uniforms_BMR[:1], "agree in B and M"),
        (q_BMW, torch.zeros(2, 3, 257), "at most 256 draws"),
        (q_BMW, uniforms_BMR.to("meta"), "on meta"),
    ):
        with pytest.raises(ValueError, match=message):
            kernel(q, uniforms)


def test_commit_stays_within_the_cache(shim):
    check_commit_within(shim)


def test_what_cannot_be_committed(shim):
    good = torch.zeros(2, 1, 6, 4)
    with pytest.raises(ValueError, match="one shape"):
        CacheCommit(shim, [good, torch.zeros(2, 1, 7, 4)])
    with pytest.raises(ValueError, match="contiguous along head"):
        CacheCommit(shim, [good.transpose(2, 3)])
    with pytest.raises(ValueError, match="one type"):
        CacheCommit(shim, [good, good.double()])
    with pytest.raises(ValueError, match="odd bytes"):
        CacheCommit(shim, [torch.zeros(1, 1, 6, 3, dtype=torch.int8)])
    commit = CacheCommit(shim, [good])
    two = torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match="path_BL has shape"):
        commit(torch.zeros(3, 2, dtype=torch.long), two, two, two)
    with pytest.raises(ValueError, match="to_B is"):
        commit(torch.zeros(2, 2, dtype=torch.long), two, two, two.int())


def test_what_cannot_be_masked(shim):
    parents_BN, lengths_B = torch.tensor([[-1, 0]]), torch.tensor([3])
    mask_B1NK, positions_BN = torch.zeros(1, 1, 2, 5, dtype=torch.bool), torch.zeros(1, 2).long()

    def build(**changed):
        given = {
            "parents_BN": parents_BN,
            "lengths_B": lengths_B,
            "last": torch.tensor(9),
            "mask_B1NK": mask_B1NK,
            "positions_BN": positions_BN,
        } | changed
        build_mask(shim, **given)

    build()
    for name, value in (
        ("mask_B1NK", mask_B1NK.float()),
        ("mask_B1NK", torch.zeros(1, 1, 5, 2, dtype=torch.bool).transpose(2, 3)),
        ("mask_B1NK", mask_B1NK[..., :1].contiguous()),
        ("lengths_B", lengths_B.to("meta")),
        ("last", torch.tensor([9])),
        ("positions_BN", positions_BN[:, :1]),
        ("parents_BN", torch.zeros(1, 257).long()),
    ):
        with pytest.raises(ValueError, match=name):
            build(**{name: value})
