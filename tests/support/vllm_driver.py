"""Serve several draft models in one process of vLLM, one after the other.

    python vllm_driver.py CASES.json RESULTS.json

CASES: {"target", "prompts", "new_tokens", "cases": {name: {"speculative": {...}, ...options}}}.
VLLM_TEST_OPTIONS is JSON of more arguments of `LLM`, such as {"enforce_eager": false}.
RESULTS: {name: {"tokens", "drafts", "accepted"} or {"error"}}, written after each case;
and "loaded": which of OURS were.
"""

import gc
import json
import os
import sys
from pathlib import Path

OURS = {"lightning", "hydra", "omegaconf", "altair", "pyarrow", "wandb"}
"""What this project needs and an engine should not load for it."""


def serve(target, prompts, new_tokens, speculative=None, **options):
    from vllm import LLM, SamplingParams

    always = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 256,
        "max_num_seqs": 4,
        "disable_log_stats": False,
    }
    more = json.loads(os.environ.get("VLLM_TEST_OPTIONS", "{}"))
    engine = LLM(model=target, speculative_config=speculative, **(always | options | more))
    # The CPU build answers wrongly above temperature 0 with any speculation: greedy only.
    sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    answers = engine.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False
    )
    counters = {counter.name: counter for counter in engine.get_metrics()}
    found = {"tokens": [list(answer.outputs[0].token_ids) for answer in answers]}
    if speculative:
        found["drafts"] = counters["vllm:spec_decode_num_drafts"].value
        found["accepted"] = counters["vllm:spec_decode_num_accepted_tokens_per_pos"].values
    return found


def main():
    from vllm.distributed import cleanup_dist_env_and_memory

    work, out = json.loads(Path(sys.argv[1]).read_text("utf-8")), Path(sys.argv[2])
    results = {}
    for name, case in work["cases"].items():
        try:
            results[name] = serve(work["target"], work["prompts"], work["new_tokens"], **case)
        except Exception as error:
            results[name] = {"error": f"{type(error).__name__}: {error}"}
        results["loaded"] = sorted(OURS & {module.split(".")[0] for module in sys.modules})
        out.write_text(json.dumps(results), "utf-8")
        gc.collect()
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main()
