"""A hub that takes what is pushed to it, over the loopback: the calls of an upload, no more."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class HubStub:
    """`with HubStub() as hub`: `hub.url` is its endpoint, `hub.files` what was committed."""

    def __init__(self, *, refuses: bool = False) -> None:
        self.refuses = refuses
        self.files: dict[str, bytes] = {}
        self.large: dict[str, bytes] = {}
        """Files of Git LFS, by sha256."""
        self.created: list[dict] = []
        self.tokens: set[str] = set()

    def __enter__(self) -> "HubStub":
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                hub.tokens.add(self.headers.get("Authorization", ""))
                if hub.refuses:
                    return self.answer({"error": "not yours"}, 403)
                return self.answer(hub.answer(self.path, body))

            def do_PUT(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                hub.large[self.path.rpartition("/")[2]] = body
                self.answer({})

            def do_GET(self) -> None:
                self.answer({"error": "not there"}, 404)

            do_HEAD = do_GET

            def answer(self, value: object, status: int = 200) -> None:
                text = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(text)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, path: str, body: bytes) -> dict:
        """Return what a hub says to a POST."""
        if path.endswith("/repos/create"):
            self.created.append(json.loads(body))
            asked = self.created[-1]
            name = f"{asked['organization']}/{asked['name']}" if "organization" in asked else ""
            return {"url": f"{self.url}/{name or asked['name']}", "id": "1", "name": name}
        if path.endswith("/validate-yaml"):  # of the card
            return {"errors": [], "warnings": []}
        if "/preupload/" in path:
            return {"files": [self._mode(file["path"]) for file in json.loads(body)["files"]]}
        if path.endswith("/objects/batch"):
            return {
                "transfer": "basic",
                "objects": list(map(self._put, json.loads(body)["objects"])),
            }
        assert "/commit/" in path, path
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            if entry["key"] == "lfsFile":
                self.files[value["path"]] = self.large[value["oid"]]
        return {"commitUrl": f"{self.url}/o/n/commit/1", "commitOid": "1" * 40, "success": True}

    def _mode(self, path: str) -> dict:
        mode = "lfs" if path.endswith(".safetensors") else "regular"
        return {"path": path, "uploadMode": mode, "shouldIgnore": False}

    def _put(self, asked: dict) -> dict:
        actions = {"upload": {"href": f"{self.url}/put/{asked['oid']}"}}
        return {"oid": asked["oid"], "size": asked["size"], "actions": actions}
