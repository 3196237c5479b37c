"""An editor's help while a recipe is written: npm's yaml-language-server with our schema."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minilm.orchestrator.recipe.library import LIBRARY

SERVER = "yaml-language-server@1.25.0"
RECIPE = """# yaml-language-server: $schema={schema}
name: mine
data: {{text: corpus, tokenizer: ./encoder}}
stages:
  - name: student
    teacher: ./encoder
    student: {{layers: 3, hidden: 192}}
    batch: 16
    steps: many
    peak_lr: 3e-4
    warmup_steps: 1
    objective: minilmv3
    learning_rate: 1
"""


class Client:
    """The few messages of the language server protocol that are needed here."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process, self.last = process, 0

    def send(self, **message: Any) -> None:
        body = json.dumps({"jsonrpc": "2.0"} | message).encode()
        assert self.process.stdin
        self.process.stdin.write(b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
        self.process.stdin.flush()

    def tell(self, method: str, params: Any) -> None:
        self.send(method=method, params=params)

    def receive(self) -> dict[str, Any]:
        out, length = self.process.stdout, 0
        assert out
        while (line := out.readline()).strip():
            if line.lower().startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        assert length, "the server has ended"
        return json.loads(out.read(length))

    def until(self, wanted: Any) -> dict[str, Any]:
        """The next message that is `wanted`; requests of the server are answered with nothing."""
        while not wanted(message := self.receive()):
            if "method" in message and "id" in message:
                items = len((message["params"] or {}).get("items", []))
                self.send(id=message["id"], result=[None] * items or None)
        return message

    def ask(self, method: str, params: Any) -> Any:
        self.last += 1
        self.send(method=method, params=params, id=self.last)
        return self.until(lambda m: m.get("id") == self.last and "method" not in m)["result"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The server's program, from the npm registry."""
    npm, folder = shutil.which("npm"), tmp_path_factory.mktemp("npm")
    if npm is None or shutil.which("node") is None:
        pytest.skip("no node and npm here")
    command = [npm, "install", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(folder), SERVER]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    if done.returncode:
        pytest.skip(f"{SERVER} can't be installed: {done.stderr.strip().splitlines()[-1:]}")
    return folder / "node_modules" / ".bin" / "yaml-language-server"


@pytest.fixture
def editor(server: Path, tmp_path: Path) -> Iterator[tuple[Client, str, list[str]]]:
    """A client in a file with the recipe open, the file's address and its lines."""
    file = tmp_path / "mine.yaml"
    text = RECIPE.format(schema=LIBRARY / "schema.json") + "    \n"  # where keys are completed
    file.write_text(text, encoding="utf-8")
    process = subprocess.Popen(
        [str(server), "--stdio"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        client = Client(process)
        hover = {
            "hover": {"contentFormat": ["markdown"]},
            "completion": {"completionItem": {"snippetSupport": True}},
        }
        root = {
            "processId": os.getpid(),
            "rootUri": tmp_path.as_uri(),
            "capabilities": {"textDocument": hover},
        }
        client.ask("initialize", root)
        client.tell("initialized", {})
        on = {"yaml": {"validate": True, "hover": True, "completion": True, "schemaStore": {"enable": False}}}
        client.tell("workspace/didChangeConfiguration", {"settings": on})
        document = {"uri": file.as_uri(), "languageId": "yaml", "version": 1, "text": text}
        client.tell("textDocument/didOpen", {"textDocument": document})
        yield client, file.as_uri(), text.splitlines()
    finally:
        process.kill()
        process.wait()


def place(lines: list[str], key: str) -> dict[str, int]:
    number = next(i for i, line in enumerate(lines) if line.strip().startswith(key))
    return {"line": number, "character": lines[number].index(key) + 1}


@pytest.mark.slow
def test_an_editor_marks_completes_and_explains(editor: tuple[Client, str, list[str]]) -> None:
    client, uri, lines = editor
    told = client.until(
        lambda m: m.get("method") == "textDocument/publishDiagnostics" and m["params"]["diagnostics"]
    )
    marked = {lines[d["range"]["start"]["line"]].strip(): d["message"] for d in told["params"]["diagnostics"]}
    assert {"steps: many", "objective: minilmv3", "learning_rate: 1"} <= set(marked), marked
    assert "minilmv2" in marked["objective: minilmv3"] and "learning_rate" in marked["learning_rate: 1"]
    assert "peak_lr: 3e-4" not in marked

    where = {"textDocument": {"uri": uri}}
    explained = json.dumps(client.ask("textDocument/hover", where | {"position": place(lines, "peak_lr")}))
    assert "Learning rate at the end of the warm-up" in explained and "Peak Lr" not in explained

    last = {"line": len(lines) - 1, "character": 4}
    found = client.ask("textDocument/completion", where | {"position": last})
    items = found["items"] if isinstance(found, dict) else found
    keys = {item["label"] for item in items}
    assert {"assistant", "schedule", "until", "weight_decay"} <= keys and "batch" not in keys

    values = place(lines, "objective")
    values["character"] = lines[values["line"]].index(": ") + 2
    found = client.ask("textDocument/completion", where | {"position": values})
    items = found["items"] if isinstance(found, dict) else found
    assert {"minilm", "minilmv2", "embedding"} <= {item["label"].strip('"') for item in items}
