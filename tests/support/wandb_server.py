"""As much of W&B's server as an upload of a run without artifacts needs, on this machine.

And servers that answer with errors: `FAULTS`.
"""

import json
import re
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAULTS = {
    "500": (500, "application/json", b'{"error": "no"}'),
    "429": (429, "application/json", b'{"error": "slow down"}'),
    "drip": (429, "text/plain", b" " * 1000),
    "401": (401, "application/json", b'{"errors": [{"message": "user is not logged in"}]}'),
    "page": (200, "text/html", b"<!doctype html><html>Sign in</html>"),
    "silent": (0, "", b""),
    "mute": (0, "", b""),
    "stream": (500, "application/json", b'{"error": "no"}'),
}
"""Name -> status, type, body. Drip sends a byte a second, silent nothing, mute no more than its
first page; stream takes the run, but no row of it."""


class Server:
    """Takes runs; `lines` are the history's rows that have arrived, `summary` is the last one."""

    def __init__(self, fault: str | None = None) -> None:
        self.lines: list[dict] = []
        self.summary: dict = {}
        self.runs: list[dict] = []
        self.stopped = threading.Event()
        self.arrived = threading.Event()
        """Set once a row of the history is here."""
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                is_taken = (fault == "stream" and "file_stream" not in self.path) or (
                    fault == "mute" and self.command == "GET"
                )
                if fault is None or is_taken:
                    self.reply(200, "application/json", json.dumps(owner.answer(self.path, body)))
                    return
                status, kind, answer = FAULTS[fault]
                if fault in ("silent", "mute"):
                    owner.stopped.wait()
                    return
                self.reply(status, kind, answer, slowly=fault == "drip")

            def reply(self, status: int, kind: str, text: str | bytes, slowly=False) -> None:
                answer = text.encode() if isinstance(text, str) else text
                self.send_response(status)
                self.send_header("content-type", kind)
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                if not slowly:
                    self.wfile.write(answer)
                    return
                with suppress(OSError):
                    while not owner.stopped.wait(1):
                        self.wfile.write(b" ")

            do_GET = do_PUT = do_POST

            def log_message(self, *arguments) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def stop(self) -> None:
        self.stopped.set()
        self._server.shutdown()
        self._server.server_close()

    def answer(self, path: str, body: bytes) -> dict:
        if path.endswith("/file_stream"):
            files = json.loads(body).get("files", {})
            history = files.get("wandb-history.jsonl", {}).get("content", [])
            self.lines += [json.loads(line) for line in history]
            for line in files.get("wandb-summary.json", {}).get("content", []):
                self.summary = json.loads(line)
            if self.lines:
                self.arrived.set()
            return {}
        if path != "/graphql":
            return {}
        asked = json.loads(body)
        name = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])
        return {"data": self._graphql(name[1] if name else "", asked.get("variables") or {})}

    def _graphql(self, name: str, variables: dict) -> dict:
        owner = {"id": "1", "name": "us"}
        if name == "RunResumeStatus":
            return {"model": {"id": "1", "name": "heads", "entity": owner, "bucket": None}}
        if name == "CreateRunFiles":
            files = [{"name": n, "uploadUrl": f"{self.url}/put"} for n in variables["files"]]
            return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": files}}
        if name != "UpsertBucket":
            return {}
        self.runs.append(variables)
        project = {"id": "1", "name": "heads", "entity": owner}
        bucket = {"id": "1", "name": variables["name"], "project": project, "historyLineCount": 0}
        return {"upsertBucket": {"bucket": {**bucket, "config": "{}"}, "inserted": True}}
