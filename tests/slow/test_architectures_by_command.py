"""Every architecture of the list, trained, calibrated and evaluated: `nox -s commands`.

Tiny random models in float32, with prompts one and three at a time. All responses are those of
plain decoding; a model that cannot be decoded ends the run before its first step, in one line.
"""

import pytest
from architectures import DECODED, RECURRENT, REFUSED, SCALED, build

from medusa_exp import compose, run
from medusa_exp.errors import UserError

STAGES = "stages=[train,calibrate,evaluate]"
SMALL = (
    "device=cpu",
    "dtype=fp32",
    "logger=none",
    "head.num_heads=2",
    "dataset.max_length=100",
    "dataset.val_fraction=0.2",
    "dataset.test_fraction=0.2",
    "train.max_steps=2",
    "train.batch_tokens=300",
    "train.val_prompts=0",
    "train.val_every=2",
    "train.val_batches=1",
    "train.loss_chunk_rows=64",
    "decode.max_new_tokens=12",
    "tree.num_prompts=2",
    "tree.max_nodes=4",
    "evaluate.num_prompts=3",
    "evaluate.batch_sizes=[1,3]",
    "evaluate.baselines=[chain]",
    "evaluate.warmup_prompts=0",
)


def run_on(model, tokenizer, data, folder, stages=STAGES, *overrides):
    """Train, calibrate and evaluate on a model saved as a directory."""
    model.resize_token_embeddings(len(tokenizer))
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    config = compose(
        [
            "+experiment=medusa1",
            f"model.path={folder / 'model'}",
            # As it was made: transformers would give a Qwen2 a tokenizer with tokens of Qwen's own.
            "tokenizer.tokenizer_class=PreTrainedTokenizerFast",
            f"dataset.path={data}",
            f"cache_dir={folder / 'cache'}",
            stages,
            *SMALL,
            *overrides,
        ]
    )
    return run(config, folder / "run")


@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize("name", [*DECODED, *RECURRENT, *SCALED])
def test_all_responses_are_plain_decodings(name, tokenizer, sharegpt_file, tmp_path):
    model = build(name, {**RECURRENT, **SCALED, **DECODED}[name])
    metrics = run_on(model, tokenizer, sharegpt_file, tmp_path)
    assert metrics["eval/identical_fraction"] == 1
    assert metrics["eval/tree/b3/identical_fraction"] == 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_decoded_is_refused_before_its_training(
    name, tokenizer, sharegpt_file, tmp_path
):
    model = build(name, REFUSED[name])
    with pytest.raises(UserError):
        run_on(model, tokenizer, sharegpt_file, tmp_path)
    assert not (tmp_path / "run" / "heads").exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*DECODED, *RECURRENT, *SCALED])
def test_medusa2_trains_the_backbone_too(name, tokenizer, sharegpt_file, tmp_path):
    model = build(name, {**RECURRENT, **SCALED, **DECODED}[name])
    metrics = run_on(model, tokenizer, sharegpt_file, tmp_path, "stages=[train]", "train=medusa2")
    assert metrics["train/loss"] > 0
    assert (tmp_path / "run/backbone/model.safetensors").exists()
