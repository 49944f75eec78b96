"""What the documents name is there; what the code offers is named."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from comfyfleet.cli.main import COMMANDS
from comfyfleet.wire.errors import all_errors

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "comfyfleet"


def named_paths(document: str) -> set[str]:
    text = (ROOT / document).read_text(encoding="utf-8")
    return set(re.findall(r"`((?:[a-z_]+/)+[a-z_]*(?:\.py)?)`", text))


def test_every_file_that_the_architecture_names_exists() -> None:
    absent = [
        path for path in named_paths("ARCHITECTURE.md") if not ((SOURCE / path).exists() or (ROOT / path).exists())
    ]

    assert absent == []


@pytest.mark.parametrize("document", ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_every_local_link_leads_somewhere(document: str) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / document).read_text(encoding="utf-8"))

    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_of_the_table_loads_and_explains_itself(name: str) -> None:
    found = importlib.import_module(COMMANDS[name][0]).command

    assert isinstance(found, click.Command)
    assert found.help


def test_the_readme_names_no_command_that_is_not_there() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`comfyfleet ([a-z-]+)", text))

    assert named <= set(COMMANDS)


def test_every_error_says_in_its_docstring_what_the_caller_did_meet() -> None:
    for error in all_errors():
        assert error.__doc__, error
        assert 400 <= error.status < 600


def test_importing_the_package_and_asking_for_help_load_no_torch() -> None:
    script = (
        "import sys, comfyfleet; from comfyfleet import Serverless; from comfyfleet.cli.main import command; "
        "print([m for m in ('torch', 'diffusers', 'transformers', 'fastapi', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"
