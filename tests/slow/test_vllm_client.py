"""A real vLLM as a worker and measured from outside: `nox -s vllm`.

Greedy only, as in test_vllm.py. One engine has hydra heads, the other none.
"""

import json
from dataclasses import replace

import pytest
from chat_files import conversation_record
from served_models import NUM_HEADS, NUM_NEW, PROMPTS
from sessions import documents_of

from medusa_exp.config import Config, DatasetConfig, ModelConfig, RegenerateConfig
from medusa_exp.decode.decoder import Decoder
from medusa_exp.decode.loop import Limits
from medusa_exp.decode.one_call import decode_plain
from medusa_exp.decode.rule import GREEDY
from medusa_exp.model import load_heads
from medusa_exp.serving.client import Engines, Probe, Work, answers
from medusa_exp.serving.measurement import measure, predicted_drafts
from medusa_exp.stages import regenerate


@pytest.fixture(scope="module")
def work(vllm_models) -> Work:
    """All that is asked for; each answer is known by its first ten tokens."""
    size = vllm_models.backbone.vocab_size
    probes = [Probe(PROMPTS[0], vllm_models.answers[0][:10])]
    return Work(Limits(NUM_NEW), GREEDY, size, 200, probes=probes)


def respond(engines: Engines) -> list[list[int]]:
    async def answer(row: int) -> tuple[int, list[int]]:
        return row, await engines.respond(PROMPTS[row])

    return [tokens for _, tokens in sorted(answers(engines, answer, range(len(PROMPTS)), 6))]


def test_answers_end_as_here_at_any_end(vllm_models, vllm_url, plain_vllm_url, work):
    said = [token for answer in vllm_models.answers for token in answer]
    text = "".join(map(chr, range(40, 300)))
    for limits in (
        Limits(NUM_NEW),
        Limits(NUM_NEW, said[20:21]),
        Limits(NUM_NEW, set(said[9::40])),
        Limits(NUM_NEW, said[5:6], [text[said[30]]], lambda ids: "".join(text[i] for i in ids)),
    ):
        probe = replace(work.probes[0], expected=[])
        [expected] = decode_plain(vllm_models.backbone, [probe.prompt], limits)
        probe = replace(probe, expected=expected.tokens[:10])
        engines = Engines([vllm_url, plain_vllm_url], replace(work, limits=limits, probes=[probe]))
        found = respond(engines)
        rows = decode_plain(vllm_models.backbone, PROMPTS, limits)
        assert found == [row.tokens for row in rows]
        assert [engine._withholds_end for engine in engines.engines] == [False, False]


def test_its_counters_are_what_was_predicted(vllm_models, vllm_url, plain_vllm_url, work):
    heads = load_heads(vllm_models.place / "hydra" / "heads", vllm_models.backbone)
    # An engine ends at the model's end; one that is asked to go on has a step without a draft more.
    limits = Limits(NUM_NEW, vllm_models.backbone.eos_token_ids)
    work = replace(work, limits=limits)
    decoder = Decoder(vllm_models.backbone, heads, limits=limits)
    plainly = [row.tokens for row in decode_plain(vllm_models.backbone, PROMPTS, limits)]
    [one, four] = measure(Engines([vllm_url], work), PROMPTS, [1, 4], warmup=1, seed=0)
    expected = predicted_drafts(decoder, PROMPTS, [len(row) for row in plainly], NUM_HEADS)
    assert one.drafts == four.drafts == expected
    [plain] = measure(Engines([plain_vllm_url], work), PROMPTS, [4], warmup=1, seed=0)
    assert plain.drafts is None
    for level in (one, four, plain):
        assert level.identical_fraction(plainly) == 1
        assert level.tokens_per_second > 0


def test_two_hundred_documents_are_those_of_this_process(vllm_models, vllm_url, tmp_path):
    chats = tmp_path / "chat.json"
    records = [conversation_record(i) for i in range(340)]
    for record in records[::2]:
        record["conversations"] += conversation_record(7)["conversations"]
    chats.write_text(json.dumps(records))
    config = Config(
        device="cpu",
        cache_dir=str(tmp_path / "cache"),
        model=ModelConfig(path=str(vllm_models.place / "target")),
        dataset=DatasetConfig(path=str(chats), val_fraction=0.2, test_fraction=0.2),
        regenerate=RegenerateConfig(190, num_val_documents=10, max_new_tokens=12),
    )
    config.dataset.max_length = 200
    config.dtype.precision = "32-true"
    config.decode.stop_ids = list(range(3, 250, 6))
    regenerate.run(config, tmp_path)
    expected = documents_of(config, tmp_path)
    config.regenerate.server = vllm_url
    metrics = regenerate.run(config, tmp_path)
    assert documents_of(config, tmp_path) == expected
    assert metrics["regenerate/documents"] == 200 < metrics["regenerate/answers"]
