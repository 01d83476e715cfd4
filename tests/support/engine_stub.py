"""A server that answers as vLLM does, with faults to order: `with Engine(backbone) as engine`.

It decodes greedily, or samples, with a backbone of its own.
It may have heads, whose chain it verifies: its counters are then those that vLLM has.
"""

import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from medusa_exp.decode.loop import Limits, Responses
from medusa_exp.decode.one_call import decode_plain
from medusa_exp.decode.rule import AcceptanceRule
from medusa_exp.tree import chain

Body = dict


class Engine:
    """The server, its answers and its faults."""

    def __init__(self, backbone, *, name: str = "tiny", port: int = 0) -> None:
        self.backbone, self.name = backbone, name
        self.models = [{"id": name, "max_model_len": 4096}]
        self.end: str = "returned"
        """Or `named` (left out, and told), `silent` (left out)."""
        self.own_ends: list[int] = []
        """Tokens that end a response of this engine, asked or not."""
        self.change: Callable[[Body, Body], None] = lambda asked, answer: None
        """Changes an answer before it is sent."""
        self.faults: list[str] = []
        """What happens to the next completions: drop, cut, slow, drip, or an HTTP status."""
        self.key: str | None = None
        self.refusal = "Unauthorized"
        """What it says to those who have another."""
        self.decoder = None
        """A `Decoder` with heads, greedy."""
        self.counters: Counter[str] = Counter()
        self.seen: list[Body] = []
        """The completions that were asked for."""
        self.connections: list[socket.socket] = []
        self.at_once = self.most_at_once = 0
        self._lock, self._decoding = threading.Lock(), threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 30

            def setup(self) -> None:
                super().setup()
                owner.connections.append(self.connection)

            def do_GET(self) -> None:
                owner.get(self)

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                owner.post(self, body)

            def log_message(self, *arguments) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "Engine":
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self._server.shutdown()
        self._server.server_close()
        for connection in self.connections:  # as the end of its process would
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def serve_forever(self) -> None:
        self._server.serve_forever()

    def get(self, handler: BaseHTTPRequestHandler) -> None:
        if handler.path == "/v1/models":
            send(handler, 200, {"object": "list", "data": self.models})
        elif handler.path == "/metrics":
            lines = [f"{name} {float(value)}" for name, value in self.counters.items()]
            send(handler, 200, "# HELP some text\n" + "\n".join(lines) + "\n")
        else:
            send(handler, 404, {"detail": "Not Found"})

    def post(self, handler: BaseHTTPRequestHandler, body: Body) -> None:
        with self._lock:
            self.seen.append(body)
            fault = self.faults.pop(0) if self.faults else ""
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            self._answer(handler, body, fault)
        finally:
            with self._lock:
                self.at_once -= 1

    def _answer(self, handler: BaseHTTPRequestHandler, body: Body, fault: str) -> None:
        if self.key and handler.headers.get("authorization") != f"Bearer {self.key}":
            send(handler, 401, {"error": self.refusal})
        elif fault == "drip":
            drip(handler)
        elif fault == "drop":
            handler.close_connection = True
            handler.connection.shutdown(socket.SHUT_RDWR)
        elif fault.isdecimal():
            send(handler, int(fault), {"error": "busy"}, {"retry-after": "0"})
        elif body["model"] != self.name:
            send(handler, 404, {"error": f"The model {body['model']} does not exist."})
        else:
            if fault == "slow":
                time.sleep(1.5)
            answer = self.answer(body)
            send(handler, 200, answer, is_cut=fault == "cut")

    def answer(self, body: Body) -> Body:
        stops = {*body["stop_token_ids"], *self.own_ends}
        tokens = self.respond(body, Limits(body["max_tokens"], stops))
        is_ended = bool(tokens) and tokens[-1] in stops
        choice = {
            "index": 0,
            "text": "",
            "finish_reason": "stop" if is_ended else "length",
            "stop_reason": None,
            "token_ids": tokens,
            "prompt_token_ids": body["prompt"],
        }
        if is_ended and self.end != "returned":
            choice["token_ids"] = tokens[:-1]
            choice["stop_reason"] = tokens[-1] if self.end == "named" else None
        found = {"model": self.name, "system_fingerprint": "stub-1", "choices": [choice]}
        self.change(body, found)
        return found

    def respond(self, body: Body, limits: Limits) -> list[int]:
        if self.decoder is not None:
            with self._decoding:
                return self._by_chain(body["prompt"], limits)
        rule = AcceptanceRule()
        if body["temperature"]:
            rule = AcceptanceRule("sampling", body["temperature"], seed=body["seed"])
        with self._decoding:
            return decode_plain(self.backbone, [body["prompt"]], limits, rule)[0].tokens

    def _by_chain(self, prompt: list[int], limits: Limits) -> list[int]:
        """Verify the chain of the heads, and count before the response is cut, as vLLM does."""
        num_heads = self.decoder.heads.num_heads
        tree, responses = chain(num_heads), Responses(1, Limits(limits.max_new_tokens + num_heads))
        whole = Responses(1, limits)
        for number, [tokens] in enumerate(
            self.decoder.steps([prompt], responses, self.decoder.drafter(tree), AcceptanceRule())
        ):
            whole.commit([tokens])
            if number:
                self.count(num_heads, len(tokens) - 1)
            if not whole.active:
                break
        return whole.rows[0].tokens

    def count(self, drafted: int, accepted: int) -> None:
        prefix, labels = "vllm:spec_decode_num_", f'engine="0",model_name="{self.name}"'
        counts = {"drafts": 1, "draft_tokens": drafted, "accepted_tokens": accepted}
        for name, value in counts.items():
            self.counters[f"{prefix}{name}_total{{{labels}}}"] += value
            self.counters[f"{prefix}{name}_created{{{labels}}}"] = 17
        for position in range(drafted):
            of_position = f'{prefix}accepted_tokens_per_pos_total{{{labels},position="{position}"}}'
            self.counters[of_position] += position < accepted


def drip(handler) -> None:
    """Send white space of an answer that never ends."""
    handler.send_response(200)
    handler.send_header("content-length", "1000")
    handler.end_headers()
    with suppress(OSError):  # until the client has gone
        for _ in range(100):
            handler.wfile.write(b" ")
            time.sleep(0.1)
    handler.close_connection = True


def send(handler, status: int, answer: Body | str, headers=(), *, is_cut: bool = False) -> None:
    text = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
    try:
        handler.send_response(status)
        for name, value in dict(headers).items():
            handler.send_header(name, value)
        handler.send_header("content-length", str(len(text)))
        handler.end_headers()
        handler.wfile.write(text[: len(text) // 2] if is_cut else text)
        if is_cut:
            handler.close_connection = True
    except OSError:  # the client has gone
        handler.close_connection = True
