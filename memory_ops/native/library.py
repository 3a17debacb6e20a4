"""The native library: the builds there are, those that this machine can run, and their functions.

A build is the same C++ compiled for one instruction set, best first: ``avx512``, ``avx2``,
``portable``. They are made when the package is installed, if there is a compiler.
"""

import ctypes
import functools
import logging
import sysconfig
from pathlib import Path

BUILDS = ("avx512", "avx2", "portable")
_FOLDER = Path(__file__).parent
_SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")

_POINTER, _INT64, _INT32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
_TABLE = (_POINTER, _INT64, _INT64, _INT64, _INT64, _INT32)
_PROTOTYPES = {
    "memplus_product_topk": (None, (_POINTER, _INT64, _INT32, _INT32, _POINTER, _POINTER)),
    "memplus_gather_rows": (_INT64, (*_TABLE, _POINTER, _POINTER, _INT64, _INT64, _POINTER)),
    "memplus_gather_groups": (None, (*_TABLE, _POINTER, _POINTER, _POINTER, _INT64, _POINTER)),
    "memplus_row_dots": (_INT64, (*_TABLE, _POINTER, _POINTER, _INT64, _INT64, _POINTER)),
    "memplus_group_rows": (_INT64, (_POINTER, _POINTER, _INT64, _INT64, *[_POINTER] * 4)),
    "memplus_read_rows": (ctypes.c_uint32, (_POINTER, _INT64, _POINTER, _INT64, _INT64)),
    "memplus_read_all": (ctypes.c_uint32, (_POINTER, _INT64)),
}
logger = logging.getLogger(__name__)


@functools.cache
def runnable_builds() -> tuple[str, ...]:
    """The builds that are there and that this machine can run, best first."""
    present = tuple(build for build in BUILDS if _file(build).exists())
    if "portable" not in present:
        return ()
    portable = ctypes.CDLL(str(_file("portable")))
    portable.memplus_best_build.restype = ctypes.c_char_p
    best = portable.memplus_best_build().decode()
    return tuple(build for build in present if BUILDS.index(build) >= BUILDS.index(best))


@functools.cache
def load(build: str) -> ctypes.CDLL:
    """Load one of the runnable builds, its functions' types set."""
    library = ctypes.CDLL(str(_file(build)))
    for name, (result, arguments) in _PROTOTYPES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


@functools.cache
def best_build() -> str | None:
    """The fastest build that this machine can run; ``None``, with one warning, if there is none."""
    builds = runnable_builds()
    if builds:
        return builds[0]
    logger.warning(
        "memplus was installed without its native library, for want of a C++ compiler (g++ with"
        " OpenMP): memory layers run on plain torch, several times slower"
    )
    return None


def _file(build: str) -> Path:
    return _FOLDER / f"{build}{_SUFFIX}"
