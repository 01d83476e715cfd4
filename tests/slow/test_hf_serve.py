"""A real `transformers serve` of a directory that decodes with heads: `nox -s serve`."""

import json
import shutil
import urllib.error
import urllib.request
from importlib.util import find_spec

import pytest
from served_models import NUM_HEADS, PROMPTS, build_target, byte_tokenizer, overfit_heads
from vllm_server import free_port, running

from medusa_exp.decode.loop import Limits
from medusa_exp.decode.one_call import decode_plain
from medusa_exp.export import hf_generate
from medusa_exp.tree import Tree

CHAT = [{"role": "user", "content": "What is 2 + 3?"}]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Yield the address, the directory and the backbone."""
    if find_spec("fastapi") is None or hf_generate.missing_for_server():
        pytest.skip("medusa-exp[serve] is not installed: nox -s serve")
    place = tmp_path_factory.mktemp("serve")
    tokenizer = byte_tokenizer()
    backbone = build_target(place / "target", tokenizer)
    answers = [r.tokens for r in decode_plain(backbone, PROMPTS, Limits(48))]
    overfit_heads(backbone, place / "heads", answers, kind="medusa")
    tree = Tree.from_paths([(0,), (1,), (0, 0), (0, 0, 0)])
    tree.save(place / "tree.json")
    assert tree.depth == NUM_HEADS
    directory = place / "served"
    hf_generate.write(place / "heads", place / "tree.json", str(place / "target"), directory)
    port = free_port()
    command = [
        *(shutil.which("transformers"), "serve", str(directory), "--trust-remote-code"),
        *("--device", "cpu", "--dtype", "float32", "--host", "127.0.0.1", "--port", str(port)),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_MODULES_CACHE", str(place / "modules"))  # where trusted code is copied
        with running(command, port, place / "log", "/health", 300) as url:
            yield url, directory, backbone


def post(url, path, **body):
    data = json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=120)


def plain_text(backbone, number):
    """Return what the model alone says to CHAT, and the tokens."""
    tokenizer = byte_tokenizer()
    ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    eos = {tokenizer.eos_token_id}
    [response] = decode_plain(backbone, [list(ids)], Limits(number, eos))
    return tokenizer.decode(response.tokens, skip_special_tokens=True), response.tokens


def ask(served, **options):
    url, directory, _ = served
    with post(url, "/v1/chat/completions", model=str(directory), messages=CHAT, **options) as reply:
        return json.load(reply)["choices"][0]["message"]["content"]


def test_two_requests_give_the_models_own_text(served):
    expected, _ = plain_text(served[2], 40)
    for _ in range(2):
        assert ask(served, max_tokens=40, temperature=0) == expected


def test_a_stream_comes_in_parts(served):
    url, directory, backbone = served
    expected, tokens = plain_text(backbone, 40)
    options = {"max_tokens": 40, "temperature": 0, "stream": True}
    parts = []
    with post(url, "/v1/chat/completions", model=str(directory), messages=CHAT, **options) as reply:
        for line in reply:
            text = line.decode().removeprefix("data: ").strip()
            if text and text != "[DONE]":
                for choice in json.loads(text)["choices"]:
                    parts.append(choice["delta"].get("content") or "")
    # Half of a character at the end never comes: so does transformers stream any model.
    assert "".join(parts).rstrip("\ufffd") == expected.rstrip("\ufffd")
    assert 3 < len([part for part in parts if part]) <= len(tokens)


def test_a_stop_string_ends_it(served):
    text, _ = plain_text(served[2], 40)
    stop = next(letter for letter in text[4:] if letter.isascii() and letter.isprintable())
    found = ask(served, max_tokens=40, temperature=0, stop=[stop])
    assert text.startswith(found) and found.rstrip(stop) == text[: text.index(stop)]


def test_what_is_not_honored_is_an_error_and_the_server_goes_on(served):
    with pytest.raises(urllib.error.HTTPError):
        ask(served, max_tokens=5, temperature=0, frequency_penalty=0.5)
    assert ask(served, max_tokens=5, temperature=0) == plain_text(served[2], 5)[0]
