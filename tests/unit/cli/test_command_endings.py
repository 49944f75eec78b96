"""How commands end when something outside is wrong: one line that says what, exit code 1 or 2, and no traceback."""

from __future__ import annotations

import errno

import pytest
from click.testing import CliRunner

from comfyfleet.cli import main
from comfyfleet.cli.main import command
from comfyfleet.cli.up_installation import AlreadyRunning, held_lock, say_where, write_client_file
from comfyfleet.cli.values import show_again
from comfyfleet.listening import CannotListen, bind
from comfyfleet.wire.errors import FleetError


class _Refused(FleetError):
    """Not today."""


def ended(monkeypatch, capsys, problem: BaseException) -> tuple[object, str]:
    """Exit code and what is told when a command ends with `problem`."""

    def run(**_: object) -> None:
        raise problem

    monkeypatch.setattr(main, "command", run)
    with pytest.raises(SystemExit) as exit_:
        main.main()
    return exit_.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("problem", "told"),
    [
        (_Refused("no such thing"), "no such thing"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "/data/file"), "/data/file: Not a directory"),
        (BaseExceptionGroup("", [ExceptionGroup("", [_Refused("the first")]), _Refused("the second")]), "the first"),
    ],
)
def test_what_a_user_can_mend_is_one_line(monkeypatch, capsys, problem, told) -> None:
    assert ended(monkeypatch, capsys, problem) == (1, f"comfyfleet: {told}\n")


@pytest.mark.parametrize(
    "bug", [ValueError("a bug"), OSError("no file is named"), BaseExceptionGroup("", [_Refused(), ValueError("a bug")])]
)
def test_a_bug_keeps_its_traceback(monkeypatch, capsys, bug) -> None:
    with pytest.raises(type(bug)):
        ended(monkeypatch, capsys, bug)


def test_a_taken_port_a_foreign_address_and_no_host_name_are_refused_with_the_reason() -> None:
    with bind("127.0.0.1", 0) as listener:
        listener.listen()
        port = listener.getsockname()[1]
        for host, wanted in (("127.0.0.1", port), ("192.0.2.1", 0), ("127.0.0.1", 70_000), ("a..b", 0)):
            with pytest.raises(CannotListen, match=f"cannot listen on {host}:{wanted}: "):
                bind(host, wanted)


@pytest.mark.parametrize(
    "arguments",
    [
        ("up", "--port", "70000"),
        ("up", "--port", "-1"),
        ("up", "--max-workers", "-4"),
        ("control", "--port", "70000"),
        ("control", "--database", "nonsense"),
        ("control", "--public-url", "nonsense"),
        ("control", "--port", "0", "--tls-cert", __file__, "--tls-key", __file__),
        ("db", "--database", "nonsense", "check"),
        ("engine", "--device", "gpu"),
        ("clean", "--data-dir", "/no/such/folder"),
        ("env", "set", "=value", "--url", "http://127.0.0.1:1", "--api-key", "x"),
    ],
)
def test_an_argument_that_cannot_be_is_refused_before_anything_starts(arguments) -> None:
    result = CliRunner().invoke(command, arguments)

    assert result.exit_code == 2
    assert "Error:" in result.output


def test_the_same_up_again_is_told_where_the_first_one_is(tmp_path) -> None:
    with held_lock(tmp_path) as lock:
        say_where(lock, "http://127.0.0.1:8080")
        with pytest.raises(AlreadyRunning, match=r"already running on .*: http://127\.0\.0\.1:8080 \(pid "):
            held_lock(tmp_path).__enter__()

    with held_lock(tmp_path) as lock:
        assert lock.read() == ""


def test_a_database_that_is_away_is_one_line_without_its_password(tmp_path) -> None:
    result = CliRunner().invoke(command, ("db", "--database", "postgresql://me:swordfish@127.0.0.1:1/x", "check"))

    assert result.exit_code == 1
    assert "Connection refused" in result.output
    assert "swordfish" not in result.output


def test_a_home_that_takes_no_link_does_not_keep_the_system_from_starting(tmp_path) -> None:
    (tmp_path / "home").write_text("no folder")

    written = write_client_file(tmp_path, url="http://127.0.0.1:1", api_key="k", link=tmp_path / "home" / "client.toml")

    assert 'url = "http://127.0.0.1:1"' in written.read_text()


def test_a_line_that_is_drawn_again_fits_a_narrow_terminal(monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "20")

    show_again("a" * 50)
    show_again("b")

    first, second = capsys.readouterr().out.split("\r")[1:]
    assert (first, second) == ("a" * 19, "b".ljust(19))
