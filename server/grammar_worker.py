"""The process that tries grammars: it compiles each one in a fork with hard limits.

The library cannot be interrupted, and a hostile grammar can make it run for hours, take all memory
or overflow the stack. Whatever compiles in a fork compiles in the engine process.
"""

import contextlib
import os
import resource
import signal
import time
import warnings
from functools import lru_cache
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

from engine.errors import RequestError
from engine.parent_death import end_with
from engine.request import RequestLimits
from engine.sampling.grammar import Grammar
from weights.checkpoints.tokenizer import load_tokenizer
from weights.grammars.compiler import GrammarCompiler
from weights.grammars.grammar_memory import COMPILED_BYTES

TRIAL_S = 1.0
# address space, of which the library's threads reserve most
_MOST_BYTES = 512 * 2**20
# less than any thread of the engine process has
_STACK_BYTES = 2**20
_MOST_ANSWERS = 128
# a refusal may be due to a busy machine
_ANSWER_S = 60


def work(connection: Connection, folder: Path, limits: RequestLimits) -> None:
    """Send None when ready; then answer each grammar with its problem, or None.

    It returns when the other end closes. Answers are kept for at most a minute, so that a hostile
    grammar that is sent again and again does not keep others waiting.
    """
    compiler = GrammarCompiler(lambda: load_tokenizer(folder), limits.vocab_size, limits.eos_ids)
    compiler.warm_up()

    @lru_cache(_MOST_ANSWERS)
    def answer(grammar: Grammar, period: int) -> str | None:
        return problem(compiler, grammar)

    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        connection.send(None)
        while True:
            connection.send(answer(connection.recv(), int(time.monotonic()) // _ANSWER_S))


def problem(compiler: GrammarCompiler, grammar: Grammar) -> str | None:
    """Try to compile a grammar in a fork of this process; returns the reason if it is refused."""
    reader, writer = Pipe(duplex=False)
    with warnings.catch_warnings():
        # libraries keep threads here, but these are idle and hold no lock
        warnings.simplefilter("ignore", DeprecationWarning)
        parent = os.getpid()
        child = os.fork()
    if not child:
        _compile_and_exit(compiler, grammar, writer, parent)
    writer.close()
    with reader:
        try:
            found: str | None = reader.recv() if reader.poll(TRIAL_S) else _too_complex(grammar)
        except EOFError:  # a limit ended it
            found = _too_complex(grammar)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return found


def _compile_and_exit(
    compiler: GrammarCompiler, grammar: Grammar, writer: Connection, parent: int
) -> None:
    try:
        end_with(parent)
        _limit_this_process()
        before = _resident_bytes()
        compiler.compile(grammar)
        grown = _resident_bytes() - before
        writer.send(None if grown <= COMPILED_BYTES else _too_complex(grammar))
    except RequestError as error:
        writer.send(error.reason)
    finally:
        os._exit(0)


def _limit_this_process() -> None:
    limits = {
        resource.RLIMIT_AS: _memory_pages()[0] * resource.getpagesize() + _MOST_BYTES,
        resource.RLIMIT_STACK: _STACK_BYTES,
        resource.RLIMIT_CPU: int(TRIAL_S) + 1,
        resource.RLIMIT_CORE: 0,
    }
    for kind, most in limits.items():
        resource.setrlimit(kind, (most, most))
    # the library writes there when it fails
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _memory_pages() -> list[int]:
    """This process's pages: mapped, resident, and kinds of them."""
    with open("/proc/self/statm") as statm:
        return [int(number) for number in statm.read().split()]


def _resident_bytes() -> int:
    # without pages of files, such as the code of the library
    _, resident, shared, *_ = _memory_pages()
    return (resident - shared) * resource.getpagesize()


def _too_complex(grammar: Grammar) -> str:
    return (
        f"the {grammar.kind} is too complex: compiling it takes more than {TRIAL_S:g} s,"
        f" {COMPILED_BYTES >> 20} MiB or the depth that is allowed"
    )
