"""Finds and loads native libraries: the fastest build that this machine can run.

A build is the same C++ compiled for one instruction set. Best first: ``avx512_amx`` and
``avx512_bf16`` (if the library has them), ``avx512``, ``avx2``, ``portable``. Installing the
package compiles them if a compiler is available.
"""

import ctypes
import functools
import logging
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from memory_ops.native.thread_team import TEAM

BUILDS = ("avx512_amx", "avx512_bf16", "avx512", "avx2", "portable")
Prototypes = Mapping[str, tuple[type | None, tuple[type, ...]]]

_SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
_POINTER, _INT64, _INT32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
_DOUBLE = ctypes.c_double
_TABLE = (_POINTER, _INT64, _INT64, _INT64, _INT64, _INT32)
_GROUPS = (*[_POINTER] * 4, _INT64)
logger = logging.getLogger(__name__)


class NativeLibrary:
    """The builds of one library.

    Attributes:
        folder: the folder that holds the builds.
        prototypes: result and argument types of the functions, by name. Each build also has
            ``memplus_best_build``, which returns the best build for this machine.
        consequence: effect of having no build, for the warning.
    """

    def __init__(self, folder: Path, prototypes: Prototypes, consequence: str) -> None:
        self.folder = folder
        self.prototypes = prototypes
        self.consequence = consequence

    @functools.cached_property
    def runnable_builds(self) -> tuple[str, ...]:
        """The installed builds that this machine can run, best first."""
        present = tuple(build for build in BUILDS if self._file(build).exists())
        if "portable" not in present:
            return ()
        try:
            portable = ctypes.CDLL(str(self._file("portable")))
        except OSError as error:
            logger.warning("cannot load memplus's native library: %s", error)
            return ()
        portable.memplus_best_build.restype = ctypes.c_char_p
        best = portable.memplus_best_build().decode()
        if best not in present:
            logger.warning(
                "memplus was installed without its %s kernels: using slower ones (install g++ 12"
                " and reinstall memplus)",
                best,
            )
        return tuple(build for build in present if BUILDS.index(build) >= BUILDS.index(best))

    @functools.cached_property
    def best_build(self) -> str | None:
        """The fastest runnable build; ``None``, with one warning, if there is none."""
        if self.runnable_builds:
            return self.runnable_builds[0]
        logger.warning(
            "memplus was installed without its native library: %s (install g++ 12 and"
            " reinstall memplus)",
            self.consequence,
        )
        return None

    def load(self, build: str) -> ctypes.CDLL:
        """Load one of the runnable builds and declare its functions' types."""
        library = ctypes.CDLL(str(self._file(build)))
        for name, (result, arguments) in self.prototypes.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        TEAM.join(library)
        return library

    def _file(self, build: str) -> Path:
        return self.folder / f"{build}{_SUFFIX}"


MEMORY_LIBRARY = NativeLibrary(
    Path(__file__).parent,
    {
        "memplus_product_topk": (None, (_POINTER, _INT64, _INT32, _INT32, _POINTER, _POINTER)),
        "memplus_gather_rows": (_INT64, (*_TABLE, _POINTER, _POINTER, _INT64, _INT64, _POINTER)),
        "memplus_add_patched_rows": (
            None,
            (*[_POINTER] * 3, _INT64, _INT64, _POINTER, _INT64),
        ),
        "memplus_gather_groups": (None, (*_TABLE, *[_POINTER] * 3, _INT64, _POINTER)),
        "memplus_row_dots": (_INT64, (*_TABLE, _POINTER, _POINTER, _INT64, _INT64, _POINTER)),
        "memplus_group_rows": (_INT64, (_POINTER, _POINTER, _INT64, _INT64, *[_POINTER] * 4)),
        "memplus_squared_norm": (_DOUBLE, (*_TABLE, *_GROUPS)),
        "memplus_sparse_adam": (None, (*_TABLE, *_GROUPS, *[_POINTER] * 3, _INT32, *[_DOUBLE] * 5)),
        "memplus_quantize_rows": (_INT64, (*_TABLE, _POINTER, _INT64, _INT64, _INT32)),
    },
    "memory layers run in plain torch, several times slower",
)
