"""vLLM's server of the OpenAI API, started for a test."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
"""A small cache, few threads, and nothing that goes over the network."""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return reply.status == 200
    except (urllib.error.URLError, OSError):
        return False


@contextmanager
def running(command: list[str], port: int, log: Path, ready: str, seconds: int) -> Iterator[str]:
    """Start a server, wait until it answers, and end it with its children.

    Yields:
        its address.
    """
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=os.environ | ENVIRONMENT,
            start_new_session=True,
        )
    try:
        until = time.monotonic() + seconds
        while not answers(url + ready):
            died = process.poll() is not None
            if died or time.monotonic() > until:
                text = log.read_text("utf-8", errors="replace")[-4000:]
                raise AssertionError(f"{'it died' if died else 'no answer'}: {text}")
            time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()


@contextmanager
def vllm_server(target: Path, log: Path, *options: str) -> Iterator[str]:
    """Serve a model, as `name` "served", in float32; yield the address.

    `vllm serve` would do the same, but asks for a distribution of the name vllm, which that of the
    CPU build is not.
    """
    port = free_port()
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(target), "--served-model-name", "served", "--dtype", "float32"),
        *("--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "4"),
        *("--host", "127.0.0.1", "--port", str(port)),
        *options,
    ]
    with running(command, port, log, "/health", 400) as url:
        yield url
