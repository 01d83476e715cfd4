"""Responses through an engine are those of the model here, whatever the engine does on the way."""

import time
from dataclasses import replace
from threading import Timer

import pytest
from engine_stub import Engine
from tiny_models import VOCAB_SIZE, build_model

from medusa_exp.decode.loop import Limits
from medusa_exp.decode.one_call import decode_plain
from medusa_exp.decode.rule import GREEDY, AcceptanceRule
from medusa_exp.errors import UserError
from medusa_exp.model import Backbone
from medusa_exp.serving import client
from medusa_exp.serving.client import Engines, Probe, Work, answers

PROMPTS = [[3, 4, 5], [7], [9, 8, 7, 6], [1, 2], [11, 12, 13], [20], [21, 22], [30, 31, 32]]
STOPS = tuple(range(0, VOCAB_SIZE, 8))
LIMITS = Limits(12, STOPS)


@pytest.fixture(scope="module")
def model() -> Backbone:
    return Backbone(build_model("llama"))


@pytest.fixture
def engine(model):
    with Engine(model) as engine:
        yield engine


@pytest.fixture
def work(model) -> Work:
    probe = Probe(PROMPTS[0], plainly(model, PROMPTS[0], Limits(6, STOPS)))
    return Work(LIMITS, GREEDY, VOCAB_SIZE, 128, probes=[probe], patience=20)


def plainly(model: Backbone, prompt: list[int], limits: Limits = LIMITS, rule=GREEDY) -> list[int]:
    return decode_plain(model, [prompt], limits, rule)[0].tokens


def ask(urls: str | list[str], work: Work, prompts=PROMPTS, concurrency=4, key=None):
    urls = [urls] if isinstance(urls, str) else urls
    engines = Engines(urls, work, key)

    async def answer(row: int) -> tuple[int, list[int]]:
        return row, await engines.respond(prompts[row], seed=1000 * row)

    found = list(answers(engines, answer, range(len(prompts)), concurrency))
    assert len(found) == len(prompts)
    return [tokens for _, tokens in sorted(found)]


@pytest.mark.parametrize("end", ["returned", "named", "silent"])
@pytest.mark.parametrize("stops", [STOPS, STOPS[:1], ()])
def test_an_answer_ends_as_here_wherever_the_engine_leaves_its_end(engine, work, model, end, stops):
    engine.end = end
    work = replace(work, limits=Limits(12, stops), probes=[])
    expected = [plainly(model, prompt, work.limits) for prompt in PROMPTS]
    probe = Probe(PROMPTS[1], expected[1])
    if end == "silent" and len(stops) > 1:
        with pytest.raises(UserError, match="neither returns nor names the token that ends"):
            ask(engine.url, replace(work, probes=[probe]))
    else:
        assert ask(engine.url, replace(work, probes=[probe])) == expected


@pytest.mark.parametrize("end", ["returned", "named"])
def test_where_the_engine_ends_by_itself_it_is_asked_to_go_on(engine, work, model, end):
    engine.end, engine.own_ends = end, list(range(1, VOCAB_SIZE, 4))
    expected = [plainly(model, prompt) for prompt in PROMPTS]
    assert ask(engine.url, work) == expected
    assert len(engine.seen) > len(PROMPTS)


def test_stop_strings_end_an_answer_as_they_do_here(engine, work, model):
    limits = Limits(12, (), ["A"], lambda ids: "".join(chr(64 + token) for token in ids))
    found = ask(engine.url, replace(work, limits=limits))
    assert found == [plainly(model, prompt, limits) for prompt in PROMPTS]
    assert engine.seen[-1]["stop"] == ["A"]


def test_a_seed_of_its_own_decides_each_sampled_answer(engine, work, model):
    rule = AcceptanceRule("sampling", temperature=0.7, top_p=0.9, top_k=7)
    found = ask(engine.url, replace(work, rule=rule, probes=[]))
    assert found == ask(engine.url, replace(work, rule=rule, probes=[]), concurrency=1)
    asked = {str(body["prompt"]): body for body in engine.seen}
    assert asked["[7]"]["seed"] == 1000 and asked["[7]"]["temperature"] == 0.7
    assert (asked["[7]"]["top_p"], asked["[7]"]["top_k"]) == (0.9, 7)


def test_so_many_are_on_their_way_at_a_time_and_no_more(engine, work):
    ask(engine.url, work, PROMPTS * 3, concurrency=5)
    assert 2 <= engine.most_at_once <= 5


def test_an_engine_that_fails_is_asked_again(engine, work, model, monkeypatch):
    monkeypatch.setattr(client, "_LONGEST_REST", 1)
    engine.faults = ["drop", "503", "", "429", "cut", "", "drop", "slow", "429", "502", "cut"]
    expected = [plainly(model, prompt) for prompt in PROMPTS]
    assert ask(engine.url, work) == expected
    assert engine.faults == []


def test_a_request_without_an_answer_in_time_is_sent_again(engine, work, model):
    engine.faults = ["", "", "", "slow", "", ""]
    found = ask(engine.url, replace(work, patience=1), PROMPTS[:3], concurrency=1)
    assert found == [plainly(model, prompt) for prompt in PROMPTS[:3]]


def test_work_goes_to_the_engines_that_are_alive(work, model, caplog):
    with Engine(model) as first, Engine(model) as second:
        found = ask([first.url, "http://127.0.0.1:9", second.url + "/v1/"], work, PROMPTS * 2)
    assert found == [plainly(model, prompt) for prompt in PROMPTS * 2]
    assert len(first.seen) > 4 and len(second.seen) > 4
    assert "127.0.0.1:9/v1 does not answer" in caplog.text


def test_an_engine_that_comes_back_is_looked_at_again(model, work):
    with Engine(model) as first:
        port = int(first.url.rpartition(":")[2])
        engines = Engines([first.url], work)

        async def answer(row: int) -> list[int]:
            return await engines.respond(PROMPTS[row])

        found = answers(engines, answer, range(len(PROMPTS)), 1)
        assert next(found) == plainly(model, PROMPTS[0])
    other, started = Backbone(build_model("llama", seed=5)), []
    timer = Timer(0.4, lambda: started.append(Engine(other, port=port).__enter__()))
    timer.start()
    with pytest.raises(UserError, match="answers otherwise than"):
        list(found)
    started[0].__exit__()


def test_where_nobody_answers_for_long_the_stage_says_so(work):
    start = time.monotonic()
    with pytest.raises(
        UserError, match=r"no answer for 1 seconds; .*ConnectError.*Start the engine"
    ):
        ask("http://127.0.0.1:9", replace(work, patience=0.5))
    assert time.monotonic() - start < 10


REFUSED = {
    "answers without token ids": lambda asked, found: found["choices"][0].pop("token_ids"),
    "has read another prompt": lambda asked, found: found["choices"][0].update(
        prompt_token_ids=[0, *asked["prompt"]]
    ),
    "says token 64, and the model of this run has 64": lambda asked, found: found["choices"][
        0
    ].update(token_ids=[64]),
    "without token ids": lambda asked, found: found.update(choices=[]),
    "gives 2 answers": lambda asked, found: found["choices"].append(found["choices"][0]),
    r"Expected `object`, got `null` - at `\$\.choices\[0\]`": lambda asked, found: found.update(
        choices=[None]
    ),
    "Expected `int`, got `str`": lambda asked, found: found["choices"][0].update(token_ids=["a"]),
    "does not say finish_reason": lambda asked, found: found["choices"][0].pop("finish_reason"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_an_engine_that_answers_something_else_is_refused_at_once(engine, work, message):
    engine.change = REFUSED[message]
    with pytest.raises(UserError, match=message):
        ask(engine.url, work)
    assert len(engine.seen) == 1


def test_an_engine_of_another_model_is_refused_at_once(work, engine, model):
    with (
        Engine(Backbone(build_model("llama", seed=1))) as other,
        pytest.raises(UserError, match=r"answers otherwise .* it says \[.*same weights"),
    ):
        ask([engine.url, other.url], work)
    assert len(other.seen) == 3


@pytest.mark.parametrize(
    ("models", "name", "message"),
    [
        ([], None, "has no model: it serves none"),
        (None, None, r"otherwise than the API .*Expected `array`, got `null` - at `\$\.data`"),
        ([{"id": "a"}, {"id": "b"}], None, "set serving.model to one: it serves a, b"),
        ([{"id": "a"}], "tiny", "has no model tiny: it serves a"),
        ([{"id": "tiny", "max_model_len": 64}], "tiny", "takes 64 tokens, and 128 are needed"),
    ],
)
def test_an_engine_without_the_model_is_refused_at_once(engine, work, models, name, message):
    engine.models = models
    with pytest.raises(UserError, match=message):
        ask(engine.url, replace(work, model=name))


def test_a_key_is_sent_and_never_shown(engine, work, caplog):
    caplog.set_level("DEBUG", logger="medusa_exp")
    engine.key = "sk-very-secret"
    assert ask(engine.url, work, key="sk-very-secret")
    engine.refusal = "Incorrect API key provided: sk-other-secret"
    with pytest.raises(UserError, match=r"401.*serving\.key_variable") as refused:
        ask(engine.url, work, key="sk-other-secret")
    dead = "http://me:hunter2@127.0.0.1:9"
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9/v1") as silent:
        ask(dead, replace(work, patience=0.2))
    for secret in ("secret", "hunter2"):
        assert secret not in f"{refused.value}{silent.value}{caplog.text}"


@pytest.mark.parametrize(
    "url",
    [
        *("localhost:8000", "", "ftp://there", "http://", "http://[::"),
        *("me:hunter2@host:80", "http://me:hunter/2@host", "http://host/v1?key=hunter2"),
    ],
)
def test_what_is_no_url_is_refused_without_its_secrets(work, url):
    with pytest.raises(UserError, match="is no URL of a server") as refused:
        ask(url, work)
    assert "hunter" not in str(refused.value)


def test_an_answer_in_drops_is_given_up(engine, work, model):
    engine.faults = ["", "", "", "drip"]
    start = time.monotonic()
    assert ask(engine.url, replace(work, patience=1), PROMPTS[:1]) == [plainly(model, PROMPTS[0])]
    assert time.monotonic() - start < 4


def test_an_engine_that_wants_to_be_asked_at_once_has_a_moment(engine, work):
    engine.faults = ["429"] * 1000
    with pytest.raises(UserError, match="HTTP status 429"):
        ask(engine.url, replace(work, patience=0.5), PROMPTS[:1])
    assert len(engine.seen) < 12


def test_what_is_answered_by_then_comes_before_an_error(engine, work, model):
    engines = Engines([engine.url], work)

    async def answer(row: int) -> list[int]:
        if row == 2:
            raise UserError("third")
        return await engines.respond(PROMPTS[row])

    found = answers(engines, answer, range(8), 1)
    assert [next(found), next(found)] == [plainly(model, prompt) for prompt in PROMPTS[:2]]
    with pytest.raises(UserError, match="third"):
        next(found)


def test_rest_grows_with_failures_but_not_with_those_that_failed_together(engine, work):
    [one] = Engines([engine.url], work).engines
    sent = time.monotonic()
    for _ in range(9):
        client._rest(one, client.Unavailable("x"), sent)
    assert one.failures == 1
    for _ in range(9):
        client._rest(one, client.Unavailable("x"), time.monotonic())
    assert 14 < one.rests_until - one.rested_at <= 30
    client._rest(one, client.Unavailable("x", 3.0), time.monotonic())
    assert one.rests_until - one.rested_at == pytest.approx(3)
