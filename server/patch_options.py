"""Options of row patches: those loaded at the start, the defaults, and the folder of others."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.request import MAX_PATCH_USES
from engine.sampling.params import option

PATCH_NAME = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}"
NAME_RULE = "1 to 64 letters, digits and . _ -, and must not begin with . or -"
_ENGINE_OPTIONS = ("max_patches", "max_patch_rows", "patch_memory_gib")


@dataclass(frozen=True)
class PatchOptions:
    """Row patches of a server.

    Raises:
        ConfigError: a field is malformed.
    """

    patch: tuple[str, ...] = option(
        (),
        "row patches to load at the start (default: none)",
        group=("row patches", "--patch law=./law med=./med --patch-dir ./patches"),
        metavar="NAME=DIR",
    )
    default_patches: tuple[str, ...] = option(
        (),
        "patches for requests without memory_patches (default: none)",
        metavar="NAME",
    )
    patch_dir: str | None = option(
        None,
        "patches that admins may load; without keys anyone (default: none)",
        metavar="DIR",
    )

    def __post_init__(self) -> None:
        names = [text.partition("=")[0] for text in self.patch]
        for text, name in zip(self.patch, names, strict=True):
            if not re.fullmatch(PATCH_NAME, name):
                raise ConfigError(f"patch: the name of {text!r} must have {NAME_RULE}")
            if not text.removeprefix(name).removeprefix("="):
                raise ConfigError(f"patch: expected NAME=DIR, not {text!r}")
            if names.count(name) > 1:
                raise ConfigError(f"patch: the name {name!r} is given twice")
        for name in self.default_patches:
            if name not in names:
                raise ConfigError(f"default_patches: --patch has no patch {name!r}")
            if self.default_patches.count(name) > 1:
                raise ConfigError(f"default_patches: {name!r} is given twice")
        if len(self.default_patches) > MAX_PATCH_USES:
            given = len(self.default_patches)
            raise ConfigError(f"default_patches: at most {MAX_PATCH_USES}, not {given}")

    @property
    def folders(self) -> Mapping[str, Path]:
        """The folders of the patches to load at the start, by name."""
        pairs = (text.split("=", 1) for text in self.patch)
        return {name: Path(folder).resolve() for name, folder in pairs}

    def check_folders(self) -> None:
        """Raise ConfigError if ``patch_dir``, or one of ``patch``, is not a folder."""
        for name, folder in self.folders.items():
            if not folder.is_dir():
                raise ConfigError(f"patch: {name}: {folder}: is not a folder")
        if self.patch_dir is not None and not Path(self.patch_dir).is_dir():
            raise ConfigError(f"patch_dir: {self.patch_dir}: is not a folder")

    def engine_config(self, engine: EngineConfig) -> EngineConfig:
        """The engine's settings; an engine that never gets a patch reserves nothing for them.

        Raises:
            ConfigError: the engine has settings of patches, but no patch can be loaded; or it does
                not allow as many as are given.
        """
        if self.patch or self.patch_dir is not None:
            given = len(self.patch)
            if engine.max_patches < max(given, 1):
                problem = f"{given} are given by --patch" if given else "--patch-dir needs 1"
                raise ConfigError(f"max_patches: {engine.max_patches} is too few; {problem}")
            return engine
        plain = EngineConfig()
        for name in _ENGINE_OPTIONS:
            # 0 patches is what the engine gets
            if getattr(engine, name) not in (getattr(plain, name), 0):
                raise ConfigError(f"{name}: needs --patch or --patch-dir")
        return replace(engine, max_patches=0)
