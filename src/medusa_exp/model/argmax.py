"""The likeliest token of each place, which greedy decoding asks for at every step.

Of a vocabulary of 262,144 tokens torch's `argmax` on a CPU takes 0.35 ms a place, and NumPy's, of
the same memory, 0.02: torch looks at one number after the other.

V vocabulary.
"""

import torch
from torch import Tensor

_WIDENED = 1 << 20
"""Numbers in half precision, which NumPy reads slowly or not at all, that are widened at a time:
what a processor's cache holds."""


def argmax(logits_V: Tensor) -> Tensor:
    """Return the place of the largest number along the last dimension [...], the first of equals.

    NaN counts as minus infinity. On other devices than a CPU nothing waits.
    """
    if logits_V.device.type == "cpu" and logits_V.numel():
        places, has_nan = _argmax_on_cpu(logits_V.detach())
        if not has_nan:
            return places
    return without_nan(logits_V).argmax(-1)


def without_nan(logits_V: Tensor) -> Tensor:
    """Return logits with minus infinity for NaN."""
    return logits_V.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)


def _argmax_on_cpu(logits_V: Tensor) -> tuple[Tensor, bool]:
    """Return places, and whether one of them holds NaN: NumPy takes it for the largest."""
    rows_RV = logits_V.reshape(-1, logits_V.shape[-1])
    is_half = rows_RV.itemsize < 4
    pieces = rows_RV.split(max(1, _WIDENED // rows_RV.shape[1])) if is_half else (rows_RV,)
    found, has_nan = [], False
    for piece_PV in pieces:
        array_PV = (piece_PV.float() if is_half else piece_PV).numpy()
        place_P = torch.from_numpy(array_PV.argmax(-1))
        found.append(place_P)
        has_nan |= bool(piece_PV.gather(1, place_P[:, None]).isnan().any())
    return torch.cat(found).view(logits_V.shape[:-1]), has_nan
