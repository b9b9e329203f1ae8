"""Flags made from config dataclasses, and what was given of them.

Each field has a flag for its name and one for each of its aliases; a flag that is not given leaves
no attribute behind, so that files and defaults show through.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from jaxserve.config import Option, nearest, options_of, parse_text
from jaxserve.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, exit status 2."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(allow_abbrev=False, **keywords)

    def error(self, message: str) -> NoReturn:
        """Prints the message and exits with status 2."""
        self.exit(2, f"jaxserve: error: {one_line(message)}\n")


def add_options(parser: Parser, cls: type, title: str) -> list[str]:
    """Adds one flag for each field of `cls` and returns the flags' names."""
    group = parser.add_argument_group(title)
    added: list[str] = []
    for item in options_of(cls):
        flags = [_flag(name) for name in (item.name, *item.aliases)]
        keywords: dict[str, Any] = {"help": _help(item), "default": argparse.SUPPRESS}
        if item.kind is bool:
            keywords["action"] = argparse.BooleanOptionalAction
            added += [f"--no-{name.lstrip('-')}" for name in flags]
        else:
            keywords["type"] = _text_parser(item)
            keywords["metavar"] = "|".join(item.choices) if item.is_closed else _METAVARS[item.kind]
        if item.kind is tuple:
            keywords["action"] = "append"
            keywords["type"] = str
        group.add_argument(*flags, dest=_dest(cls, item.name), **keywords)
        added += flags
    return added


_METAVARS: dict[type, str] = {int: "N", float: "X", str: "TEXT", tuple: "TEXT"}


def _flag(name: str) -> str:
    return f"-{name}" if len(name) == 1 and name != "n" else f"--{name.replace('_', '-')}"


def _dest(cls: type, name: str) -> str:
    return f"{cls.__name__}.{name}"


def _help(item: Option) -> str:
    is_silent = item.default in ((), "", None) or "(default" in item.help
    shown = "" if is_silent or item.kind is bool else f" (default: {item.default})"
    if item.kind is bool:
        shown = f" (default: {'on' if item.default else 'off'})"
    return (item.help + shown).replace("%", "%%")


def _text_parser(item: Option) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            return parse_text(item, text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse


class VersionAction(argparse.Action):
    """Prints the version."""

    def __init__(self, option_strings: Sequence[str], dest: str, **keywords: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help="print the version")

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from jaxserve import __version__

        print(f"jaxserve {__version__}")
        parser.exit()


def with_dashes(argv: Iterable[str]) -> list[str]:
    """Returns argv with `--max_model_len` spelt `--max-model-len`; values stay as they are."""
    words = []
    for word in argv:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            word = flag.replace("_", "-") + equals + value
        words.append(word)
    return words


def unknown_message(unknown: Sequence[str], flags: Sequence[str]) -> str:
    """Returns what is wrong with arguments that no flag takes, naming the nearest."""
    word = next((word for word in unknown if word.startswith("-")), unknown[0]).partition("=")[0]
    if not word.startswith("-"):
        return f"unexpected argument {word!r}"
    near = nearest(word, flags)
    return f"unknown flag {word}" + (f"; did you mean {near}?" if near else "; see --help")


def one_line(text: str) -> str:
    """Returns the text with its line breaks made blanks."""
    return " ".join(text.split())


def given_options(args: argparse.Namespace, cls: type) -> dict[str, Any]:
    """Returns the options of `cls` that were given as flags, by field name."""
    prefix = _dest(cls, "")
    return {
        key.removeprefix(prefix): value
        for key, value in vars(args).items()
        if key.startswith(prefix)
    }
