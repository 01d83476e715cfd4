"""The backbone's hidden states of a list of examples, kept on disk and read through a memory map.

A directory of `.npy` files: `hidden` [P, D] and `own` [P] of all stored positions, `starts` [N + 1]
and `checks` [N], where an example's positions begin and the crc32 of their bytes, and
`summary.json`. Which positions of an example are stored follows from its mask of trained tokens:
those from which a head may learn, or at which the backbone says what a head is to say; or all of
them, where heads look back.

N examples, P positions, B batch, T time, D hidden.
"""

import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from medusa_exp.errors import UserError
from medusa_exp.runs.files import read_json, sha256_file
from medusa_exp.runs.schemas import FeaturesSummary

REACH = 16
"""The most heads that stored positions are enough for: `head.num_heads` allows no more."""
FORMAT = 1
"""To be raised when what is stored changes: states of another format are made anew."""
_SUMMARY = "summary.json"
_ARRAYS = ("hidden.npy", "own.npy", "starts.npy", "checks.npy")


def stored_positions(is_trained: np.ndarray, stores_all: bool) -> np.ndarray:
    """Return, in order, each t for which one of the tokens t+1 .. t+1+REACH is trained; or each."""
    size = len(is_trained)
    if stores_all:
        return np.arange(size)
    before = np.concatenate([[0], np.cumsum(is_trained)])
    t = np.arange(size)
    return np.flatnonzero(before[np.minimum(t + 2 + REACH, size)] > before[np.minimum(t + 1, size)])


class Features:
    """Hidden states and the backbone's own next tokens at the stored positions of examples."""

    def __init__(self, path: Path) -> None:
        """Open a directory.

        Raises:
            UserError: its files are not those that were written.
        """
        self.path = path
        for name in (_SUMMARY, *_ARRAYS):
            if not (path / name).is_file():
                raise self._damaged(name)
        self.summary = read_json(path / _SUMMARY, kind=FeaturesSummary)
        if self.summary is None:
            raise self._damaged(_SUMMARY)
        self._stores_all = self.summary.get("stores_all", False)
        for name, digest in self.summary["sha256"].items():
            if sha256_file(path / name) != digest:
                raise self._damaged(name)
        self._hidden_PD, self._teacher_P, self._starts, self._checks = map(self._open, _ARRAYS)
        if len(self._hidden_PD) != self._starts[-1] or len(self._teacher_P) != self._starts[-1]:
            raise self._damaged("hidden.npy")

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        """Return an example's (hidden_PD, teacher_P): the backbone's own token after each position.

        Raises:
            UserError: the bytes on disk have changed since they were written.
        """
        place = slice(self._starts[number], self._starts[number + 1])
        hidden_PD, teacher_P = np.array(self._hidden_PD[place]), np.array(self._teacher_P[place])
        if checksum(hidden_PD, teacher_P) != self._checks[number]:
            raise self._damaged(f"hidden.npy, document {number}")
        hidden = torch.from_numpy(hidden_PD)
        if hidden.dtype == torch.int16:
            hidden = hidden.view(torch.bfloat16)
        return hidden, torch.from_numpy(teacher_P).long()

    def rows(
        self,
        numbers: list[list[int]],
        example_BT: Tensor,
        is_trained_BT: Tensor,
        input_ids_BT: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return (hidden_BTD, teacher_BT) of a batch: zeros and its tokens where nothing is kept.

        `teacher_BT` has in place of each trained token what the backbone says there.
        """
        width = self._hidden_PD.shape[1]
        dtype = torch.bfloat16 if self._hidden_PD.dtype == np.int16 else torch.float32
        hidden_BTD = torch.zeros(*input_ids_BT.shape, width, dtype=dtype)
        teacher_BT = input_ids_BT.clone()
        for b, row in enumerate(numbers):
            for place, number in enumerate(row, 1):
                where_T = (example_BT[b] == place).nonzero()[:, 0]
                is_trained_T = is_trained_BT[b, where_T]
                stored = stored_positions(is_trained_T.numpy(), self._stores_all)
                stored_P = where_T[torch.from_numpy(stored)]
                hidden_PD, teacher_P = self[number]
                hidden_BTD[b, stored_P] = hidden_PD
                is_next_P = stored_P < where_T[-1]
                next_P, teacher_P = stored_P[is_next_P] + 1, teacher_P[is_next_P]
                is_label_P = is_trained_BT[b, next_P]
                teacher_BT[b, next_P[is_label_P]] = teacher_P[is_label_P]
        return hidden_BTD, teacher_BT

    def _open(self, name: str) -> np.ndarray:
        is_large = name in ("hidden.npy", "own.npy")
        try:
            found: np.ndarray = np.load(self.path / name, mmap_mode="r" if is_large else None)
        except (OSError, EOFError, ValueError) as error:  # it was cut off
            raise self._damaged(name) from error
        return found

    def _damaged(self, what: str) -> UserError:
        return UserError(
            f"{self.path}: {what} is not what was written there: delete that directory, and it is "
            "made anew."
        )


def checksum(hidden_PD: np.ndarray, teacher_P: np.ndarray) -> int:
    """Return the crc32 of an example's stored bytes."""
    return zlib.crc32(teacher_P.tobytes(), zlib.crc32(hidden_PD.tobytes()))
