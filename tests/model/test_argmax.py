"""The likeliest token: the first of equals, and never NaN."""

import pytest
import torch

from medusa_exp.model import argmax as module
from medusa_exp.model.argmax import argmax, without_nan


@pytest.fixture(autouse=True)
def by_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask NumPy however few logits there are."""
    monkeypatch.setattr(module, "_WORTH_NUMPY", 1)


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 7), (2, 9, 512), (3, 33), (5,), (0, 4)])
def test_it_is_torchs_argmax(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    # A few values: most rows hold their largest more than once.
    logits_V = torch.randint(-3, 3, shape).to(dtype)
    found = argmax(logits_V)
    assert found.dtype == torch.long
    assert found.tolist() == logits_V.argmax(-1).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_is_never_the_likeliest(dtype: torch.dtype) -> None:
    nan, inf = torch.nan, torch.inf
    rows = [[nan, 1, 2, 2], [3, nan, 1, nan], [-inf, nan, 0, 0], [nan] * 4, [-inf, 0, inf, inf]]
    assert argmax(torch.tensor(rows, dtype=dtype)).tolist() == [2, 0, 2, 0, 2]


def test_widened_pieces_are_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    logits_RV = torch.randn(7, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    logits_RV[6, 3] = torch.nan
    expected = without_nan(logits_RV).argmax(-1)
    for most in (1, 100, 149):
        monkeypatch.setattr(module, "_WIDENED_AT_ONCE", most)
        assert torch.equal(argmax(logits_RV), expected)


def test_rows_need_not_lie_side_by_side_and_may_ask_for_gradients() -> None:
    logits_VR = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.equal(argmax(logits_VR.T), logits_VR.argmax(0))


def test_torch_is_asked_only_where_there_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the slow way")

    logits_RV = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    expected = logits_RV.argmax(-1)
    with monkeypatch.context() as watched:
        watched.setattr(torch.Tensor, "argmax", refuse)
        for dtype in DTYPES:
            assert argmax(logits_RV.to(dtype)).shape == (3,)
        assert torch.equal(argmax(logits_RV), expected)
        with pytest.raises(AssertionError, match="the slow way"):
            argmax(logits_RV * torch.nan)


def test_a_few_logits_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(module, "_argmax_on_cpu", None)
    assert argmax(torch.tensor([[1.0, torch.nan, 3.0]])).tolist() == [2]
