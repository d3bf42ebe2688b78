"""Help in groups. An option names its group; a command names its options that are rarely needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

GENERAL = "Options"
BUDGET = "What decode reads (give one)"
SAMPLING = "Sampling"
TEXT = "Text"
WEIGHTS = "Weights"
RARE = "Rarely needed"
ORDER = (GENERAL, BUDGET, TEXT, WEIGHTS, SAMPLING, RARE)

WIDTH = 100  # columns of help texts


class GroupedOption(click.Option):
    """An option with the title of its group in help."""

    def __init__(self, *arguments: Any, group: str = GENERAL, **others: Any) -> None:
        super().__init__(*arguments, **others)
        self.group = group


class GroupedCommand(click.Command):
    """A command whose help lists options by group, and those named in `rare` (by parameter name) last."""

    def __init__(self, *arguments: Any, rare: Iterable[str] = (), **others: Any) -> None:
        super().__init__(*arguments, **others)
        self.rare = frozenset(rare)
        if unknown := self.rare - {parameter.name for parameter in self.params}:
            raise ValueError(f"{self.name} has no parameters {sorted(unknown)}.")

    def group_of(self, parameter: click.Parameter) -> str:
        """Return the title of the group that a parameter is listed in."""
        return RARE if parameter.name in self.rare else getattr(parameter, "group", GENERAL)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one section for each group, where click writes one for all options."""
        sections: dict[str, list[tuple[str, str]]] = {title: [] for title in ORDER}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and not isinstance(parameter, click.Argument):
                sections[self.group_of(parameter)].append(record)
        for title, records in sections.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


option = partial(click.option, cls=GroupedOption)


def command(name: str | None = None, *, rare: Iterable[str] = ()) -> Callable[[Callable[..., Any]], GroupedCommand]:
    """Return a decorator as click.command, for a command with grouped help."""
    return click.command(name, cls=GroupedCommand, rare=rare)
