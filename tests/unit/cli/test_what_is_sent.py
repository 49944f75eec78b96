"""What a command sends to the control plane, what it refuses to send, and what it lets onto the terminal."""

from __future__ import annotations

import http.server
import json
import threading
from urllib.parse import parse_qs

import pytest
from click.testing import CliRunner

from comfyfleet.cli.asking import printable
from comfyfleet.cli.main import command
from comfyfleet.wire.errors import BadRequest, Unauthorized

NOWHERE = ("--url", "http://127.0.0.1:1", "--api-key", "k")


class Asked:
    """A server that answers everything with `answer`, and remembers the addresses."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.answer: dict = {}
        asked = self

        class Door(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.paths.append(self.path)
                body = json.dumps(asked.answer).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.HTTPServer(("127.0.0.1", 0), Door)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)

    def run(self, *arguments: str) -> str:
        where = ("--url", f"http://127.0.0.1:{self.server.server_port}", "--api-key", "k")
        return CliRunner().invoke(command, [*arguments, *where], catch_exceptions=False).output


@pytest.fixture
def asked():
    asked = Asked()
    asked.thread.start()
    yield asked
    asked.server.shutdown()
    asked.thread.join()
    asked.server.server_close()


@pytest.mark.parametrize(
    "arguments",
    [
        *(("key", "create", "k", "--expires-in-days", text) for text in ("nan", "inf", "0", "-1")),
        *(("key", "create", "k", "--requests-per-s", text) for text in ("nan", "inf", "-1")),
        ("key", "create", "k", "--max-waiting-jobs", "-1"),
        ("key", "create", "k", "--gpu-seconds-per-day", "-1"),
        *(("key", "create", "k", "--weight", text) for text in ("nan", "0", "-1")),
        *(("endpoint", "create", "e", option, "nan") for option in ("--min-load", "--inactivity-timeout")),
        ("endpoint", "create", "e", "--cold-workers", "-1"),
        ("endpoint", "update", "e", "--target-util", "inf"),
        ("workergroup", "create", "e", "--gpu-ram", "nan"),
        *(("jobs", "submit", __file__, "--deadline-s", text) for text in ("nan", "inf", "0")),
        ("jobs", "list", "--limit", "-1"),
        *(
            ("jobs", what, job_id)
            for what in ("show", "wait", "cancel")
            for job_id in ("../keys", "..", "", "a?b", "ü")
        ),
        *(("key", "revoke", key_id) for key_id in ("../env/X", "..", "")),
        *(("env", "unset", name) for name in ("../keys/1", "..", "")),
        ("env", "set", "../keys/1=x"),
    ],
)
def test_what_would_mean_something_else_on_the_way_is_refused_in_one_line(arguments) -> None:
    result = CliRunner().invoke(command, [*arguments, *NOWHERE])

    assert result.exit_code == 2
    assert "Error: Invalid value" in result.output.splitlines()[-1]


def test_a_time_below_zero_is_no_mistake_where_it_means_never() -> None:
    refused = CliRunner().invoke(command, ["endpoint", "create", "e", "--inactivity-timeout", "-1", *NOWHERE])

    assert refused.exit_code == 1, "it was sent: nobody answered there"


@pytest.mark.parametrize("name", ["a&b", "plain#x", "50% off", "a+b ü"])
def test_a_name_arrives_as_it_was_typed(asked, name) -> None:
    asked.answer = {"jobs": []}
    asked.run("jobs", "list", "--endpoint", name, "--status", "queued")

    (path,) = asked.paths
    address, _, query = path.partition("?")
    assert (address, query.count("&")) == ("/v1/jobs", 2)
    assert parse_qs(query) == {"limit": ["20"], "status": ["queued"], "endpoint": [name]}


def test_a_file_of_brackets_is_not_a_traceback(tmp_path) -> None:
    (tmp_path / "deep.json").write_text("[" * 5000)
    (tmp_path / "bytes.json").write_bytes(b'"\xff"')

    for name in ("deep.json", "bytes.json"):
        result = CliRunner().invoke(command, ["jobs", "submit", str(tmp_path / name), *NOWHERE])
        assert result.exit_code == 2
        assert f"{name} is not JSON" in result.output


@pytest.mark.parametrize("key", ["a\nb", "ключ", "\udcff", "a\x00"])
def test_a_key_that_no_header_can_carry_is_refused(key) -> None:
    result = CliRunner().invoke(command, ["key", "list", "--url", "http://127.0.0.1:1", "--api-key", key])

    assert isinstance(result.exception, Unauthorized)


def test_an_argument_that_is_no_text_is_refused() -> None:
    result = CliRunner().invoke(command, ["endpoint", "create", "\udcff", *NOWHERE])

    assert isinstance(result.exception, BadRequest)


def test_what_others_stored_does_not_command_the_terminal(asked) -> None:
    value = "\x1b]0;mine\x07 two\nlines \u202eback"
    asked.answer = {"variables": [{"name": "X", "is_secret": False, "value": value, "updated_at": 0}]}

    shown = asked.run("env", "list")

    assert len(shown.splitlines()) == 2
    assert r"\x1b]0;mine\x07 two\nlines \u202eback" in shown
    assert json.loads(asked.run("env", "list", "--raw"))[0]["value"] == value
    asked.answer = {"keys": [{"id": "1", "name": "\x9b2J", "scopes": ["read"], "endpoint_ids": []}]}
    assert r"\x9b2J" in asked.run("key", "list")
    assert printable("größe 日本") == "größe 日本"
