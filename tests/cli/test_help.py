"""Help: common options fit one screen, rare ones come last, and docs/commands.md has all of them."""

from __future__ import annotations

import runpy
from pathlib import Path

import click
import pytest

from tda_export.cli.help_groups import ORDER, RARE, GroupedCommand, command, option
from tda_export.cli.main import cli
from tests.conftest import run_cli, run_ok

SCREEN = 40  # lines
DOCS = Path(__file__).parents[2] / "docs"


def help_of(name: str) -> str:
    return run_cli(name, "--help", terminal_width=100).stdout


def titles(text: str) -> list[str]:
    return [line.removesuffix(":") for line in text.splitlines() if line.removesuffix(":") in ORDER]


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_common_options_fit_one_screen(name: str) -> None:
    common, _, _ = help_of(name).partition(f"\n{RARE}:\n")
    assert len(common.splitlines()) <= SCREEN
    assert all(len(line) <= 100 for line in help_of(name).splitlines())


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_every_option_is_listed_once(name: str) -> None:
    text = help_of(name)
    assert titles(text) == [title for title in ORDER if title in titles(text)]  # once each, rare ones last
    starts = [line.split()[0].rstrip(",") for line in text.splitlines() if line.startswith("  -")]
    options = [item for item in cli.commands[name].params if isinstance(item, click.Option)]
    assert sorted(starts) == sorted([*(item.opts[0] for item in options), "-h"])
    assert all(item.help for item in options)


def test_help_of_the_program_fits_one_screen() -> None:
    assert len(run_ok("--help").stdout.splitlines()) <= SCREEN


def test_rare_options_of_no_parameter_are_refused() -> None:
    with pytest.raises(ValueError, match=r"paint has no parameters \['colour'\]"):
        command("paint", rare=("colour",))(option("--size")(lambda size: None))


def test_options_without_a_group_are_general() -> None:
    """click.option can be used too."""
    made = command("paint", rare=("size",))(option("--size")(click.option("--colour")(lambda size, colour: None)))
    assert isinstance(made, GroupedCommand)
    with click.Context(made) as context:
        assert titles(made.get_help(context)) == ["Options", RARE]


def test_the_page_of_commands_is_current() -> None:
    """python docs/make_commands.py writes it."""
    made = runpy.run_path(str(DOCS / "make_commands.py"))["page"]()
    assert (DOCS / "commands.md").read_text(encoding="utf-8") == made
