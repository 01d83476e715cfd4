"""Regenerate responses, being killed again and again at moments that chance picks, until done.

    python killed_answers.py CONFIG_PICKLE RUN_DIR SEED KILLS

Each process is a fork of this one; see `killed.py`. Prints how many documents had been written down
at each kill, as JSON.
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

from medusa_exp.runs.files import read_jsonl
from medusa_exp.stages import regenerate


def regenerate_in_child(config, out: Path) -> None:
    """Run the stage in a process of its own, and end that process."""
    with Path(os.devnull).open("w") as null:
        os.dup2(null.fileno(), 2)
    regenerate.run(config, out)
    os._exit(0)


def num_written(cache: Path) -> int:
    return sum(len(read_jsonl(path)) for path in cache.glob("regenerated/.*.answers.jsonl"))


def main() -> None:
    config = pickle.loads(Path(sys.argv[1]).read_bytes())
    out, rng = Path(sys.argv[2]), random.Random(int(sys.argv[3]))
    out.mkdir()
    torch.set_num_threads(1)
    cache, written = Path(config.cache_dir), []
    for is_killed in [True] * int(sys.argv[4]) + [False]:
        goal = num_written(cache) + rng.randint(1, 4)
        child = os.fork()
        if not child:
            regenerate_in_child(config, out)
        if is_killed:
            while num_written(cache) < goal:
                time.sleep(0.001)
            time.sleep(rng.random() * 0.01)
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        written += [num_written(cache)] if is_killed else []
    print(json.dumps(written))


if __name__ == "__main__":
    main()
