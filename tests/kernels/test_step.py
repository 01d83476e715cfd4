"""The kernels around the backbone against the torch code that they stand in for."""

import numpy as np
import pytest
import torch
from kernel_shim import ORDERS
from tiny_models import build_model

from medusa_exp.decode.attention import StepMask
from medusa_exp.decode.cache import TreeCache
from medusa_exp.decode.step_cupy import CacheCommit, build_mask


def random_tree(rng: np.random.Generator, nodes: int) -> torch.Tensor:
    return torch.tensor([-1, *(int(rng.integers(0, n)) for n in range(1, nodes))])


def ancestors_of(parents_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ancestors_NN (itself included) and depths_N."""
    ancestors_NN = torch.eye(len(parents_N), dtype=torch.bool)
    for node, parent in enumerate(parents_N.tolist()):
        if parent >= 0:
            ancestors_NN[node] |= ancestors_NN[parent]
    return ancestors_NN, ancestors_NN.sum(1) - 1


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_the_mask_is_that_of_torch(shim, architecture, order):
    """mistral has a sliding window."""
    shim.order = order
    rng = np.random.default_rng(7)
    step_mask = StepMask(build_model(architecture), capacity=200)
    assert (step_mask.window is not None) == (architecture == "mistral")
    for seed in range(12):
        shim.seed = seed
        nodes, batch = int(rng.integers(2, 40)), int(rng.integers(1, 4))
        trees = [random_tree(rng, nodes) for _ in range(batch)]
        relations = [ancestors_of(parents_N) for parents_N in trees]
        depths_BN = torch.stack([depths_N for _, depths_N in relations])
        lengths = rng.integers(1, 30 if seed % 2 else 150, batch).tolist()
        expected = step_mask.at(lengths, torch.stack([a for a, _ in relations]), depths_BN)
        mask_B1NK = torch.zeros(batch, 1, nodes, max(lengths) + nodes, dtype=torch.bool)
        positions_BN = torch.empty(batch, nodes, dtype=torch.long)
        build_mask(
            shim,
            torch.stack(trees),
            torch.tensor(lengths),
            mask_B1NK=mask_B1NK,
            positions_BN=positions_BN,
            window=step_mask.window,
            last_position=100,
        )
        assert mask_B1NK.equal(expected)
        assert positions_BN.equal((torch.tensor(lengths)[:, None] + depths_BN).clamp(max=100))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("dtype", "head", "unit"),
    [(torch.bfloat16, 16, 16), (torch.float32, 5, 4), (torch.float16, 3, 2)],
)
def test_the_commit_is_that_of_the_cache(shim, dtype, head, unit, order):
    shim.order = order
    rng = np.random.default_rng(1)
    for seed in range(10):
        shim.seed = seed
        batch, nodes = int(rng.integers(1, 4)), int(rng.integers(1, 12))
        cache = TreeCache(num_layers=2, capacity=60, num_rows=batch)
        lengths = rng.integers(1, 30, batch).tolist()
        total = max(lengths) + nodes
        for layer in range(2):
            shape = (batch, 3, total, head)
            cache.update(torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), layer)
        cache.lengths = lengths
        tensors = [states for layer in cache.layers for states in (layer.keys, layer.values)]
        ours = [states.clone() for states in tensors]
        paths = [
            [0, *sorted(rng.choice(np.arange(1, nodes), rng.integers(0, nodes), replace=False))]
            for _ in range(batch)
        ]
        width = max(map(len, paths))
        path_BL = torch.tensor([[*map(int, p), *[-1] * (width - len(p))] for p in paths])
        commit = CacheCommit(shim, ours)
        assert commit._defines == (f"UNIT_BYTES={unit}",)
        commit(
            path_BL,
            torch.tensor([len(path) - 1 for path in paths]),
            torch.full((batch,), max(lengths)),
            torch.tensor(lengths),
        )
        cache.commit([[int(node) for node in path] for path in paths])
        for mine, states in zip(ours, tensors, strict=True):
            for row, (length, path) in enumerate(zip(lengths, paths, strict=True)):
                kept = length + len(path)
                assert mine[row, :, :kept].equal(states[row, :, :kept])
                assert mine[row, :, total:].equal(states[row, :, total:])


def test_commit_stays_within_the_cache(shim):
    tensors = [torch.arange(24.0).reshape(1, 1, 6, 4) for _ in range(2)]
    before = tensors[0].clone()
    ends = torch.tensor([4]), torch.tensor([2])
    CacheCommit(shim, tensors)(torch.tensor([[0, 1, 7]]), torch.tensor([50]), *ends)
    assert tensors[0][:, :, [2, 3]].equal(before[:, :, [4, 5]])
    assert tensors[0][:, :, [0, 1, 4, 5]].equal(before[:, :, [0, 1, 4, 5]])


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
        ("positions_BN", positions_BN[:, :1]),
        ("parents_BN", torch.zeros(1, 257).long()),
    ):
        with pytest.raises(ValueError, match=name):
            build(**{name: value})
