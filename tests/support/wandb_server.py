"""As much of W&B's server as an upload of a run without artifacts needs, on this machine."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server:
    """Takes runs; `lines` are the history's rows that have arrived, `summary` is the last one."""

    def __init__(self) -> None:
        self.lines: list[dict] = []
        self.summary: dict = {}
        self.runs: list[dict] = []
        self.arrived = threading.Event()
        """Set once a row of the history is here."""
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                answer = json.dumps(owner.answer(self.path, body)).encode()
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            do_GET = do_PUT = do_POST

            def log_message(self, *arguments) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def stop(self) -> None:
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
