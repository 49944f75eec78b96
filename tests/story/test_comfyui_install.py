"""`comfyfleet provision comfyui`: cloned at a pin, in its own environment, proved by its own server; then started."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from comfyfleet.cli.provision import command

pytestmark = pytest.mark.slow

# A program of ours with ComfyUI's command line; it imports what lies in custom_nodes, as ComfyUI does.
MAIN = """
import argparse, importlib.util, json, pathlib
from http.server import BaseHTTPRequestHandler, HTTPServer
p = argparse.ArgumentParser(); p.add_argument("--listen"); p.add_argument("--port", type=int)
p.add_argument("--cpu", action="store_true"); a, _ = p.parse_known_args()
nodes = {"KSampler": {"python_module": "nodes"}}
for folder in pathlib.Path("custom_nodes").glob("*/__init__.py"):
    spec = importlib.util.spec_from_file_location(folder.parent.name, folder); m = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(m)
    except Exception as e:
        print("IMPORT FAILED", folder, e); continue
    for name in m.NODE_CLASS_MAPPINGS: nodes[name] = {"python_module": f"custom_nodes.{folder.parent.name}"}
class H(BaseHTTPRequestHandler):
    def log_message(self, *_): pass
    def do_GET(self):
        body = json.dumps(nodes).encode(); self.send_response(200)
        self.send_header("Content-Type", "application/json"); self.send_header("Content-Length", str(len(body)))
        self.end_headers(); self.wfile.write(body)
HTTPServer(("127.0.0.1", a.port), H).serve_forever()
"""


def a_repository(folder: Path, files: dict[str, str], tag: str = "") -> str:
    """A commit's id."""
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    who = ["git", "-c", "user.name=t", "-c", "user.email=t@example.com", "-c", "commit.gpgsign=false"]
    for words in (
        ["init", "-q", "-b", "main"],
        ["add", "-A"],
        ["commit", "-qm", "one"],
        *([["tag", tag]] if tag else []),
    ):
        subprocess.run([*who, *words], cwd=folder, check=True, capture_output=True)
    return subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


def provision(tmp_path: Path, monkeypatch, *words: str, node: str = "NODE_CLASS_MAPPINGS = {'Reverb': object}") -> str:
    a_repository(tmp_path / "comfy", {"main.py": MAIN, "requirements.txt": ""}, tag="v0.3.64")
    commit = a_repository(tmp_path / "reverb", {"__init__.py": node})
    (tmp_path / "with-node.toml").write_text(
        f'[[custom_nodes]]\nrepository = "{(tmp_path / "reverb").as_uri()}"\ncommit = "{commit}"\n'
    )
    monkeypatch.setenv("COMFYFLEET_COMFYUI_REPO", (tmp_path / "comfy").as_uri())
    monkeypatch.delenv("COMFYUI_INSTALL_PATH", raising=False)
    done = CliRunner().invoke(
        command,
        ["comfyui", "--path", str(tmp_path / "ComfyUI"), "--nodes-of", str(tmp_path / "with-node.toml"), *words],
    )
    return done.output + (str(done.exception) if done.exception else "")


def test_a_pinned_install_with_its_node_is_proved_by_its_own_server(tmp_path: Path, monkeypatch):
    printed = provision(tmp_path, monkeypatch)

    assert "2 node classes import" in printed
    assert f"COMFYUI_INSTALL_PATH={tmp_path / 'ComfyUI'}" in printed
    assert (tmp_path / "ComfyUI" / "venv" / "bin" / "python").exists()


def test_a_node_stays_at_its_pinned_commit_when_its_repository_goes_on(tmp_path: Path, monkeypatch):
    provision(tmp_path, monkeypatch, "--dry-run")
    (tmp_path / "reverb" / "__init__.py").write_text("raise ImportError('a later commit')")
    who = ["git", "-c", "user.name=t", "-c", "user.email=t@example.com", "-c", "commit.gpgsign=false"]
    subprocess.run([*who, "commit", "-qam", "two"], cwd=tmp_path / "reverb", check=True, capture_output=True)

    done = CliRunner().invoke(
        command,
        ["comfyui", "--path", str(tmp_path / "ComfyUI"), "--nodes-of", str(tmp_path / "with-node.toml"), "--no-check"],
    )

    assert done.exit_code == 0, done.output
    installed = tmp_path / "ComfyUI" / "custom_nodes" / "reverb" / "__init__.py"
    assert installed.read_text() == "NODE_CLASS_MAPPINGS = {'Reverb': object}"


def test_a_custom_node_that_does_not_import_is_named(tmp_path: Path, monkeypatch):
    printed = provision(tmp_path, monkeypatch, node="import not_installed_anywhere")

    assert "custom nodes that did not import: reverb" in printed
