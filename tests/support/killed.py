"""Train, being killed again and again at moments that chance picks, until it is done.

    python killed.py CONFIG_PICKLE RUN_DIR SEED SIGNAL ...

Each process is a fork of this one, which saves it the imports: it has run nothing in threads yet.
Prints the steps from which the processes went on, as JSON.
"""

import json
import os
import pickle
import random
import signal
import sys
import time
from pathlib import Path

import torch

import medusa_exp.train.trainer
from medusa_exp.errors import UserError
from medusa_exp.runs.files import read_jsonl
from medusa_exp.runs.record import RunRecord
from medusa_exp.stages import train
from medusa_exp.stages.session import Session


def train_in_child(config, out: Path) -> None:
    """Train in a process of its own, and end that process."""
    try:
        with Path(os.devnull).open("w") as null:
            os.dup2(null.fileno(), 1)
        session = Session(config, out)
        with RunRecord(out, config, []).stage("train") as session.notes:
            train.run(config, out, session)
    except UserError as error:
        print(error, file=sys.stderr)
        os._exit(1)
    os._exit(0)


def steps(out: Path) -> int:
    return max((line["step"] for line in read_jsonl(out / "history.jsonl")), default=-1)


def main() -> None:
    config = pickle.loads(Path(sys.argv[1]).read_bytes())
    out, rng = Path(sys.argv[2]), random.Random(int(sys.argv[3]))
    out.mkdir()
    torch.set_num_threads(1)
    medusa_exp.train.trainer.LOG_EVERY = 1
    resumed = []
    for name in [*sys.argv[4:], None]:
        before = steps(out)
        child = os.fork()
        if not child:
            train_in_child(config, out)
        if name:
            goal = min(before + rng.randint(3, 9), config.train.max_steps - 3)
            while steps(out) < goal:
                time.sleep(0.002)
            time.sleep(rng.random() * 0.02)
            os.kill(child, getattr(signal, name))
        os.waitpid(child, 0)
        run = json.loads((out / "run.json").read_text())
        resumed.append(run["stages"]["train"]["resumed_from_step"])
    print(json.dumps(resumed))


if __name__ == "__main__":
    main()
