"""What steps of few rows take on a CPU: packed and int8 products, argmax, steps over a tree.

    python benchmarks/packed.py                           shapes, and a random Llama of 14 M
    python benchmarks/packed.py --model DIR --heads DIR   a model and heads of yours

All forms run in turn, prompt by prompt, in one process; only ratios are worth comparing between
machines. Acceptance does not depend on the form, so that tokens a second follow from the steps; of
a model with heads they are measured too. With --threads 1 the process's own time is taken, which
other load on the machine hardly changes. A processor without AVX-512 is imitated by
`ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2`, of which MKL heeds
the last on Intel's alone.
"""

import argparse
import json
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from statistics import quantiles

import torch
from measuring import best_seconds, machine
from torch import nn
from torch.nn.functional import linear
from transformers import LlamaConfig, LlamaForCausalLM

from medusa_exp.config import ModelConfig
from medusa_exp.decode.decoder import Decoder
from medusa_exp.decode.loop import Limits, Responses
from medusa_exp.model import build_heads
from medusa_exp.model.argmax import argmax, without_nan
from medusa_exp.model.backbone import Backbone
from medusa_exp.model.checkpoint import load_heads
from medusa_exp.model.int8 import to_int8
from medusa_exp.model.loading import load_backbone
from medusa_exp.model.packed import _product, _reordered, pack, unpack
from medusa_exp.model.source import ModelSpec
from medusa_exp.tree import Tree

SHAPES = (
    *((256, 1024), (384, 1024), (384, 4096), (640, 2048), (2048, 640), (1024, 4096)),
    (640, 16384),  # a projection of heads
)
INT8 = "packed, int8 heads"
VOCABULARIES = (4096, 32000, 128256, 262144)
ROWS = (1, 2, 4, 8, 16, 64)
_REPEATS = 9
TREES = {
    8: Tree.from_paths([[0], [0, 0], [0, 0, 0], [0, 0, 0, 0], [1], [0, 1], [2]]),
    16: Tree.from_paths(
        [
            *([0], [0, 0], [0, 0, 0], [0, 0, 0, 0], [1], [0, 1], [2]),
            *([1, 0], [3], [0, 0, 1], [0, 2], [4], [5], [0, 0, 2], [0, 1, 0]),
        ]
    ),
}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a directory; without it a random Llama of 14 M")
    parser.add_argument("--heads", help="of that model")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--kind", default="medusa", help="of heads that are made, not loaded")
    parser.add_argument("--cache", help="keeps which form is faster")
    parser.add_argument("--no-shapes", action="store_true")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    found = {"machine": machine(), "capability": torch.backends.cpu.get_cpu_capability()}
    found |= {"threads": given.threads, "dtype": given.dtype}
    found |= {"model": given.model or "random 14 M"}
    with torch.inference_mode():
        if not given.no_shapes:
            found["products_us"] = products(getattr(torch, given.dtype))
            found["argmax_us"] = argmaxes(getattr(torch, given.dtype))
        found["steps"] = steps(given)
    text = json.dumps(found, indent=1)
    print(text)
    if given.out:
        given.out.write_text(text + "\n", encoding="utf-8")


def products(dtype: torch.dtype) -> list[dict[str, float]]:
    """Return microseconds of each shape and number of rows, in all forms.

    Of one matrix again and again: what a cache holds of it, a product does not read from memory.
    """
    rows = []
    for inputs, outputs in SHAPES:
        weight = torch.randn(outputs, inputs).to(dtype)
        packed, layers = _reordered(weight), nn.ModuleList([nn.Linear(inputs, outputs, bias=False)])
        layers[0].weight.copy_(weight)
        has_int8 = to_int8(layers)
        for number in ROWS:
            x = torch.randn(number, inputs).to(dtype)
            forms = {
                "linear": lambda x=x, w=weight: linear(x, w),
                "packed": lambda x=x, p=packed: _product(x, p, None),
            }
            if has_int8:
                forms["int8"] = lambda x=x, layer=layers[0]: layer(x)
            rows.append({"inputs": inputs, "outputs": outputs, "rows": number, **_times(forms)})
    return rows


def argmaxes(dtype: torch.dtype) -> list[dict[str, float]]:
    """Return microseconds of torch's argmax and ours, over some vocabularies."""
    rows = []
    for size in VOCABULARIES:
        for number in (1, 9):
            x = torch.randn(number, size).to(dtype)
            forms = {"torch": lambda x=x: without_nan(x).argmax(-1), "ours": lambda x=x: argmax(x)}
            rows.append({"vocabulary": size, "rows": number, **_times(forms)})
    return rows


def _times(forms: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return the least microseconds of each of some functions, called in turn."""
    for form in forms.values():
        form()
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds = best_seconds(_REPEATS, *forms.values(), clock=clock)
    return {name: round(one * 1e6, 1) for name, one in zip(forms, seconds, strict=True)}


def steps(given: argparse.Namespace) -> dict[str, object]:
    """Return seconds of steps by form and tree, their ratios, and whether all tokens agree."""
    backbone = _backbone(given)
    if given.heads:
        heads = load_heads(Path(given.heads), backbone)
    else:
        heads = build_heads(backbone, num_heads=4, kind=given.kind)
    heads = heads.to(backbone.model.dtype).eval().requires_grad_(False)
    in_int8 = deepcopy(heads).attach(backbone)
    forms = ("linear", "packed")
    if to_int8(in_int8.lm_heads.output_layers()):
        forms += (INT8,)
    limits = Limits(given.tokens, frozenset())
    decoders = [Decoder(backbone, some, limits=limits) for some in (heads, in_int8)]
    modules = [backbone.model, *(decoder.heads for decoder in decoders)]
    draws = torch.Generator().manual_seed(0)
    seconds: dict[tuple[str, int], list[float]] = {}
    tokens: dict[tuple[str, int], list[list[int]]] = {}
    backbone.names.keep()
    for number in range(given.rounds + 1):  # the first warms up
        prompt = torch.randint(5, backbone.vocab_size, (64,), generator=draws).tolist()
        for form in forms:
            decoder = decoders[form == INT8]
            if form == "packed":
                pack(modules, given.cache, kept=[backbone.lm_head])
            for nodes in (1, *TREES):
                drafter = decoder.drafter(TREES[nodes]) if nodes > 1 else decoder.root_only()
                times, said = _decode(decoder, prompt, drafter)
                if number:
                    seconds.setdefault((form, nodes), []).extend(times)
                    tokens.setdefault((form, nodes), []).append(said)
        unpack(modules)
    kinds = [(form, nodes) for form in forms for nodes in (1, *TREES)]
    typical = {kind: quantiles(seconds[kind], n=4)[0] for kind in kinds}
    count = {kind: sum(map(len, tokens[kind])) / len(seconds[kind]) for kind in kinds}
    speed = {kind: count[kind] / typical[kind] for kind in kinds}
    return {
        "step_ms": {f"{form} {n}": round(typical[form, n] * 1e3, 3) for form, n in kinds},
        "step_over_plain": {
            f"{form} {n}": round(typical[form, n] / typical[form, 1], 3) for form, n in kinds
        },
        "tokens_per_step": {f"{form} {n}": round(count[form, n], 3) for form, n in kinds},
        "tokens_per_second": {f"{form} {n}": round(speed[form, n], 2) for form, n in kinds},
        "over_linear": {
            f"{form} {n}": round(speed[form, n] / speed["linear", n], 3)
            for form in forms[1:]
            for n in (1, *TREES)
        },
        "speedup": {f"{form} {n}": round(speed[form, n] / speed[form, 1], 3) for form, n in kinds},
        "identical": all(said == tokens["linear", 1] for said in tokens.values()),
    }


def _backbone(given: argparse.Namespace) -> Backbone:
    if given.model:
        return load_backbone(
            ModelSpec(ModelConfig(path=given.model), dtype=given.dtype, device="cpu")
        )
    config = LlamaConfig(
        **{"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6},
        **{"num_attention_heads": 6, "num_key_value_heads": 6, "vocab_size": 4096},
    )
    model = LlamaForCausalLM(config).to(getattr(torch, given.dtype))
    return Backbone(model.eval().requires_grad_(False))


def _decode(decoder: Decoder, prompt: list[int], drafter: object) -> tuple[list[float], list[int]]:
    """Return the seconds of each step but the first, which has the prompt, and the tokens."""
    responses, times = Responses(1, decoder.limits), []
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    for _ in decoder.steps([prompt], responses, drafter):
        times.append(clock() - start)
        start = clock()
    return times[1:], responses.rows[0].tokens


if __name__ == "__main__":
    main()
