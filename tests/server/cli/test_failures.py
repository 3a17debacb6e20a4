"""Every verb against read-only places, full disks, missing inputs, closed pipes and Ctrl+C.

Verbs and options are found in the argument parser, so that a new one is tested too.
"""

import argparse
import contextlib
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from engine.process import EngineFailedError, EngineStartError
from server.cli import exit_status as exits
from server.cli import main as command_line
from server.cli.main import main
from tests.server.running import serve_command
from weights.errors import DataError

# of the arguments that are paths, those that are read
INPUTS = {"config", "configs", "dict", "facts", "known", "patch", "patches", "questions", "text"}
INPUTS |= {"tokenizer", "trace"}
# names of models and texts: a missing one is an error too
NAMES = {"background", "first", "memory_adapter", "model", "neutral", "second", "source", "texts"}
COMMAND = [sys.executable, "-m", "server.cli.command"]


def leaves(parser: argparse.ArgumentParser, path: tuple[str, ...] = ()) -> dict:
    """The parsers of all verbs, by the words that call them."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return {
                words: leaf
                for name, one in action.choices.items()
                for words, leaf in leaves(one, (*path, name)).items()
            }
    return {path: parser}


PARSER = command_line._parser()
VERBS = leaves(PARSER)
OUTPUTS = {
    (*words, dest): kind
    for words, verb in VERBS.items()
    for dest, kind in (verb.get_default("outputs") or {}).items()
}
# they start a server, or load the HTTP process's modules
SLOW = {("bench", "startup"), ("bench", "overload"), ("bench", "http")}
READERS = {
    words: found
    for words, verb in VERBS.items()
    if (found := [one.dest for one in verb._actions if one.dest in INPUTS | NAMES])
}


@pytest.fixture(autouse=True)
def one_parser(monkeypatch):
    """Make the parser once, because it takes longer than the rest of a test."""
    monkeypatch.setattr(command_line, "_parser", lambda: PARSER)


def arguments(words: tuple[str, ...], given: dict[str, object]) -> list[str]:
    """A command line with these values, and some value for whatever else is required."""
    line = list(words)
    for action in VERBS[words]._actions:
        value = None if action.type is int else given.get(action.dest)
        if value is None and (action.required or not action.option_strings):
            value = action.choices[0] if action.choices else given["else"]
            value = 1 if action.type is float else value
        if value is not None:
            line += [*action.option_strings[-1:], str(value)]
            line += [str(value)] * (action.nargs == 2)
    return line


def refused(line: list[str], capsys) -> str:
    """The single line of a refusal, without its prefix."""
    assert main(line) == exits.USAGE_ERROR
    said = [one for one in capsys.readouterr().err.splitlines() if not is_setting(one)]
    assert len(said) == 1 and said[0].startswith("memplus: "), said
    return said[0].removeprefix("memplus: ")


def is_setting(line: str) -> bool:
    return line.startswith(("threads: ", "device: "))


@contextlib.contextmanager
def full_disk():
    """No byte can be written to a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_every_path_is_a_result_or_an_input():
    paths = {
        (*words, action.dest)
        for words, verb in VERBS.items()
        for action in verb._actions
        if action.type is Path
    }
    assert {one for one in paths if one[-1] not in INPUTS} == set(OUTPUTS)
    assert len(VERBS) > 30 and len(OUTPUTS) > 20


@pytest.mark.parametrize("words", OUTPUTS, ids=" ".join)
def test_the_place_of_a_result_is_checked_first(words, tmp_path, capsys):
    (*verb, dest), kind = words, OUTPUTS[words]
    (tmp_path / "file").touch()
    (action,) = (one for one in VERBS[tuple(verb)]._actions if one.dest == dest)
    typed = next(iter(action.option_strings), action.metavar)

    def problem(place: object) -> str:
        return refused(arguments(tuple(verb), {dest: place, "else": tmp_path / "none"}), capsys)

    # nobody can create files there, not even root
    assert problem("/proc/new").startswith(f"{typed}: /proc/new cannot be written (")
    assert problem(tmp_path / "file" / "new").startswith(f"{typed}: ")
    if kind == "file":
        assert problem(tmp_path).startswith(f"{typed}: {tmp_path} cannot be written")
        missing = tmp_path / "none" / "new"
        assert problem(missing) == f"{typed}: folder {missing.parent} does not exist"
    with full_disk():
        assert problem(tmp_path / "new").endswith(" cannot be written (File too large)")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(one, marks=[pytest.mark.slow] * (one in SLOW), id=" ".join(one))
        for one in READERS
        if one != ("serve",)  # it would set up the logs of this process
    ],
)
def test_a_missing_input_is_one_line(words, tmp_path, capsys):
    given: dict[str, object] = dict.fromkeys(READERS[words], tmp_path / "none")
    given |= {dest: tmp_path / "new" for *verb, dest in OUTPUTS if tuple(verb) == words}
    if words == ("eval",):
        del given["model"], given["memory_adapter"]
        given["compare"] = tmp_path / "none"
    assert refused(arguments(words, given | {"else": tmp_path / "none"}), capsys)
    assert not (tmp_path / "new").exists() or words[0] == "bench"


@pytest.mark.parametrize("words", VERBS, ids=" ".join)
def test_a_closed_or_full_stdout_ends_a_verb_without_a_traceback(words, monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    for file, code, said in (
        (writer, exits.CLOSED_PIPE, ""),
        ("/dev/full", exits.FAILURE, "memplus: stdout: No space left on device\n"),
    ):
        with open(file, "w") as stdout, monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", stdout)
            assert main([*words, "--help"]) == code
        assert capsys.readouterr().err == said


@pytest.mark.parametrize("place", ["pipe", "/dev/full"])
def test_a_failed_stdout_hides_no_error_of_the_verb(place, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    said: list[str] = []

    def run() -> int:
        print("a line that is buffered")
        raise DataError("step 3: the loss is nan")

    with open(writer if place == "pipe" else place, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert exits.exit_status(run, said.append) == exits.USAGE_ERROR
        with pytest.raises(AssertionError):
            exits.exit_status(lambda: print("x") or check_false(), said.append)
    assert said == ["memplus: step 3: the loss is nan"]


def check_false() -> int:
    raise AssertionError


def test_a_closed_stdout_ends_real_work(memory_plus_folder, monkeypatch, capsys):
    for line in (["inspect"], ["generate", "x", "--max-tokens", "3", "--model"]):
        reader, writer = os.pipe()
        os.close(reader)
        with open(writer, "w") as stdout, monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", stdout)
            assert main([*line, str(memory_plus_folder)]) == exits.CLOSED_PIPE
        assert "memplus:" not in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdout", None)  # as after >&-
    assert main(["inspect", str(memory_plus_folder)]) == exits.FAILURE
    assert capsys.readouterr().err == "memplus: stdout: Bad file descriptor\n"


def raising(error: BaseException):
    def run():
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (DataError("a.txt: is empty"), 2, "memplus: a.txt: is empty"),
        (FileNotFoundError(2, "No such file or directory", "a"), 1, "a: No such file or directory"),
        (OSError("two\nlines"), 1, "memplus: two lines"),
        (ConnectionRefusedError(111, "Connection refused"), 1, "memplus: Connection refused"),
        (BrokenPipeError(32, "Broken pipe"), 1, "memplus: Broken pipe"),
        (MemoryError(), 1, "memplus: out of memory; "),
        (EngineFailedError("the engine died"), 1, "memplus: the engine died"),
        (EngineStartError("no such model"), 2, "memplus: no such model"),
        (OSError(12, "Cannot allocate memory"), 1, "memplus: out of memory; "),
        (
            RuntimeError(
                "DefaultCPUAllocator: can't allocate memory: you tried to allocate 3145728"
            ),
            1,
            "memplus: out of memory; ",
        ),
        (
            RuntimeError("can't allocate memory: you tried to allocate 3145728 bytes. Error code"),
            1,
            "memplus: out of memory: needs 3.0 MiB more; ",
        ),
        (RuntimeError("CUDA out of memory. Tried 1 GiB.\nmore"), 1, "CUDA out of memory. Tried"),
    ],
)
def test_an_error_is_one_line_and_a_status(error, code, line):
    lines = []
    assert exits.exit_status(raising(error), lines.append) == code
    (said,) = lines
    assert line in said and "\n" not in said
    assert "out of memory" not in line or "available (" in said or "CUDA" in said


def test_errors_of_memplus_itself_keep_their_traceback():
    for error in (RuntimeError("a bug"), AssertionError(), SystemExit(3)):
        with pytest.raises(type(error)):
            exits.exit_status(raising(error), pytest.fail)


@pytest.fixture
def heeds_ctrl_c():
    """Makes SIGINT an interrupt, which a parent of the tests may have made ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_ctrl_c_ends_a_verb_even_if_a_library_hides_it():
    def run():
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            # a second one ends the process
            assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
            raise RecursionError("while a module is imported") from None

    assert exits.exit_status(run, pytest.fail) == exits.INTERRUPTED
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert exits.exit_status(raising(KeyboardInterrupt()), pytest.fail) == exits.INTERRUPTED


def test_an_ignored_ctrl_c_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as nohup and shell scripts do
    try:
        assert exits.exit_status(lambda: signal.raise_signal(signal.SIGINT) or 0, pytest.fail) == 0
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["threads: ", "loading", "serving"])
@pytest.mark.parametrize("count", [1, 2])
def test_ctrl_c_in_a_terminal_ends_the_server_without_a_traceback(memory_plus_folder, stage, count):
    command = serve_command(memory_plus_folder)
    command[2] = COMMAND[2]
    options = {"stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(command, **options) as process:
        assert any(line.startswith(stage) for line in process.stderr)
        for _ in range(count):
            # a terminal sends it to every process of the group
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGINT)
        errors = process.communicate(timeout=60)[1]
    assert process.returncode in (0, 130, -signal.SIGINT)
    assert "Traceback" not in errors and "Exception ignored" not in errors


@pytest.mark.slow
def test_ctrl_c_and_a_closed_pipe_end_a_command_without_a_traceback(memory_plus_folder):
    command = [*COMMAND, "generate", "x", "--ignore-eos", "--max-tokens", "500"]
    command += ["--model", str(memory_plus_folder)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    for number in (None, signal.SIGINT):
        with subprocess.Popen(command, **pipes) as process:
            assert process.stdout.read(1)
            if number is None:
                process.stdout.close()
            else:
                process.send_signal(number)
            process.wait(timeout=60)
            errors = process.stderr.read()
        assert process.returncode == (exits.INTERRUPTED if number else exits.CLOSED_PIPE)
        assert all(map(is_setting, errors.splitlines()))


@pytest.mark.slow
def test_a_full_disk_and_a_read_only_one_end_a_conversion(memory_plus_folder, tmp_path):
    for options, reason in (("size=64k", "No space left on device"), ("ro", "Read-only")):
        folder = tmp_path / options
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("file systems cannot be mounted here")
        try:
            command = [*COMMAND, "convert", str(memory_plus_folder), str(folder / "new")]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == exits.USAGE_ERROR and not os.listdir(folder)
            assert "Traceback" not in done.stderr and reason in done.stderr.splitlines()[-1]
        finally:
            subprocess.run(["umount", str(folder)], check=True)
