"""Options of ``memplus train`` that list its settings or write an example, and exit."""

import argparse
from pathlib import Path
from typing import Any


class ShowSettings(argparse.Action):
    """Prints every setting; needs no other argument, as ``--help``."""

    def __init__(self, option_strings: list[str], dest: str, help: str) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Print and exit with 0."""
        from weights.training.config_help import describe_settings

        print(describe_settings())
        parser.exit()


class WriteExample(argparse.Action):
    """Writes an example of the settings; needs no other argument."""

    def __init__(self, option_strings: list[str], dest: str, metavar: str, help: str) -> None:
        super().__init__(
            option_strings, dest, default=argparse.SUPPRESS, metavar=metavar, help=help
        )

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, file: Any, *_: Any
    ) -> None:
        """Write the file and exit with 0; exit with 2 if it exists or cannot be written."""
        from weights.training.config_help import example_config

        try:
            _write_new(Path(file), example_config())
        except OSError as error:
            parser.exit(2, f"memplus: {file}: {error.strerror}\n")
        print(f"{file}: put the names of your texts into data.train")
        parser.exit()


def _write_new(file: Path, text: str) -> None:
    """Write a file that does not exist yet, whole or not at all (OSError)."""
    with open(file, "x", encoding="utf-8") as new:
        try:
            new.write(text)
            new.flush()
        except OSError:
            file.unlink()
            raise
