"""Regenerate through an engine, while it and the stage are killed at moments that chance picks.

    python killed_engines.py CONFIG_PICKLE DIRECTORY SEED NUM_KILLS

The documents are answered in process first, and the engine answers what was answered there. Each
process is a fork of this one, which saves it the imports: it has run nothing in threads yet.
Prints how often which of the two was killed, and whether all documents are the same, as JSON.
"""

import json
import os
import pickle
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from engine_stub import Engine
from sessions import documents_of
from vllm_server import free_port

from medusa_exp.errors import UserError
from medusa_exp.model import Backbone
from medusa_exp.model.loading import load_backbone
from medusa_exp.stages import regenerate
from medusa_exp.stages.session import Session


class Remembering(Engine):
    """An engine that knows the answers, and takes a while for each."""

    def __init__(self, backbone: Backbone, answers: dict[tuple[int, ...], list[int]], port: int):
        super().__init__(backbone, port=port)
        self.answers = answers

    def respond(self, body, limits):
        known = self.answers.get(tuple(body["prompt"]))
        if known is None or limits.max_new_tokens < len(known):  # a probe
            return super().respond(body, limits)
        time.sleep(0.01)
        return known


def in_child(work: Callable[[], object]) -> int:
    """Do something in a process of its own; return its number."""
    child = os.fork()
    if child:
        return child
    try:
        with Path(os.devnull).open("w") as null:
            os.dup2(null.fileno(), 1)
        work()
    except UserError as error:
        print(error, file=sys.stderr)
        os._exit(1)
    os._exit(0)


def answers_of(documents: list[dict]) -> dict[tuple[int, ...], list[int]]:
    """Return prompt -> response of every turn."""
    found = {}
    for document in documents:
        ids, trained = document["input_ids"], [*document["is_trained"], 0]
        starts = [i for i in range(1, len(ids)) if trained[i] and not trained[i - 1]]
        for start in starts:
            stop = next(i for i in range(start, len(trained)) if not trained[i])
            found[tuple(ids[:start])] = ids[start:stop]
    return found


def num_answered(config) -> int:
    files = Path(config.cache_dir, "regenerated").glob(".*.answers.jsonl")
    return sum(path.read_bytes().count(b"\n") for path in files)


def main() -> None:
    config = pickle.loads(Path(sys.argv[1]).read_bytes())
    out, rng, kills = Path(sys.argv[2]), random.Random(int(sys.argv[3])), int(sys.argv[4])
    torch.set_num_threads(1)
    os.waitpid(in_child(lambda: regenerate.run(config, out)), 0)
    expected = documents_of(config, out)
    answers, port = answers_of(expected), free_port()
    config.regenerate.server = f"http://127.0.0.1:{port}"
    config.regenerate.server_concurrency = 4
    config.serving.patience = 20

    def serve() -> None:
        backbone = load_backbone(Session(config, out).spec, None)
        Remembering(backbone, answers, port).serve_forever()

    works = {"engine": serve, "stage": lambda: regenerate.run(config, out)}
    children = {name: in_child(work) for name, work in works.items()}
    killed: Counter[str] = Counter()
    for _ in range(kills):
        goal = num_answered(config) + rng.randint(3, 12)
        while num_answered(config) < goal:
            if os.waitpid(children["stage"], os.WNOHANG)[0]:
                sys.exit("the stage has ended")
            time.sleep(0.002)
        time.sleep(rng.random() * 0.02)
        name = rng.choice(["engine", "stage"])
        os.kill(children[name], signal.SIGKILL)
        os.waitpid(children[name], 0)
        killed[name] += 1
        children[name] = in_child(works[name])
    _, status = os.waitpid(children["stage"], 0)
    os.kill(children["engine"], signal.SIGKILL)
    found = documents_of(config, out)
    same = found == expected and len({json.dumps(document) for document in found}) == len(found)
    print(json.dumps({"killed": killed, "status": status, "number": len(found), "same": same}))


if __name__ == "__main__":
    main()
