"""A token in a repository's address is git's to know: no message, log line or kept file has it."""

from __future__ import annotations

import pytest
from structlog.testing import capture_logs

from comfyfleet.provision.checkout import checkout, run, without_userinfo
from comfyfleet.wire.errors import ProvisionFailed

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("text", "bare"),
    [
        ("https://user:swordfish@host/a.git", "https://host/a.git"),
        ("https://swordfish@host/a", "https://host/a"),
        ("installing git+https://x:swordfish@host/a@main", "installing git+https://host/a@main"),
        ("https://host/a@b", "https://host/a@b"),
        ("git@host:a/b.git", "git@host:a/b.git"),
        ("/srv/a.git", "/srv/a.git"),
    ],
)
def test_only_what_stands_before_a_hosts_at_sign_goes(text: str, bare: str) -> None:
    assert without_userinfo(text) == bare


async def test_a_repository_that_cannot_be_had_is_named_without_its_token(tmp_path) -> None:
    with pytest.raises(ProvisionFailed, match="cloning http://127") as failure:
        await checkout("http://user:swordfish@127.0.0.1:1/a.git", "", tmp_path / "clone")

    assert "swordfish" not in str(failure.value)
    with pytest.raises(ProvisionFailed) as failure:
        await run(["sh", "-c", "echo fatal: https://user:swordfish@host/a; exit 3"], what="x")
    assert str(failure.value) == "x failed with code 3: fatal: https://host/a"


async def test_a_checkout_leaves_no_token_on_disk_or_in_the_log(tmp_path) -> None:
    source = tmp_path / "source"
    git = ["git", "-C", str(source), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    await run(["git", "init", "--quiet", str(source)], what="init")
    await run([*git, "commit", "--quiet", "--allow-empty", "-m", "one"], what="commit")

    with capture_logs() as lines:
        await checkout(f"file://user:swordfish@localhost{source}", "", tmp_path / "clone")

    assert "swordfish" not in (tmp_path / "clone" / ".git" / "config").read_text()
    assert "swordfish" not in str(lines)
