"""Repository rules: import order, sizes, names, and the file map in docs/structure.md."""

import ast
import builtins
import functools
import re
import sys
from pathlib import Path

import pytest

from tests.covered_by import COVERED_BY

ROOT = Path(__file__).parent.parent
PACKAGES = ("memory_ops", "engine", "weights", "server", "benchmarks")
# a package imports itself and those before it; benchmarks import all; the CLI imports benchmarks
ALLOWED = {package: set(PACKAGES[: i + 1]) for i, package in enumerate(PACKAGES)}
# a subpackage of the engine imports itself and those listed
VOCABULARY = ("engine.config", "engine.errors", "engine.progress", "engine.request")
ENGINE_IMPORTS = {
    "engine/model/": ("engine.model",),
    "engine/sampling/": ("engine.sampling", "engine.errors"),
    "engine/executors/": (
        *("engine.executors", "engine.model", "engine.sampling", *VOCABULARY),
        *("engine.parent_death", "engine.shielded_start"),  # of tensor-parallel ranks
    ),
}
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
MODULES = {*FILES, *TESTS}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(path: Path) -> list[str]:
    """Every module that a file imports, inside functions and TYPE_CHECKING too."""
    found = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # transformers copies these files into a separate package
            assert not node.level or "remote_code" in path.parts, f"{name(path)}: is relative"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def is_jit(function: ast.AST) -> bool:
    return any("jit" in ast.unparse(d) for d in getattr(function, "decorator_list", []))


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_point_downwards(path):
    package = path.relative_to(ROOT).parts[0]
    allowed = ALLOWED[package] | ({"benchmarks"} if name(path) == "server/cli/main.py" else set())
    wrong = {m for m in imports(path) if m.split(".")[0] in PACKAGES} - {
        m for m in imports(path) if m.split(".")[0] in allowed
    }
    assert not wrong


@pytest.mark.parametrize("path", FILES, ids=name)
def test_engine_subpackages_import_downwards(path):
    folder = next((folder for folder in ENGINE_IMPORTS if name(path).startswith(folder)), None)
    if folder is None:
        return
    ours = [module for module in imports(path) if module.startswith("engine.")]
    assert not [
        m for m in ours if not m.startswith(tuple(f"{one}." for one in ENGINE_IMPORTS[folder]))
    ]
    if folder == "engine/model/":
        # the model must not depend on tiers or kernels
        tables = [
            m for m in imports(path) if m.startswith(("memory_ops.tables", "memory_ops.native"))
        ]
        assert all(m.startswith("memory_ops.tables.value_table.") for m in tables)


def test_the_table_protocol_does_not_import_ctypes():
    start = ROOT / "memory_ops" / "tables" / "value_table.py"
    seen, pending = set(), [start]
    while pending:
        path = pending.pop()
        if path in seen:
            continue
        seen.add(path)
        modules = imports(path)
        assert "ctypes" not in {module.split(".")[0] for module in modules}, name(path)
        stems = {part for module in modules for part in (module, module.rpartition(".")[0])}
        files = (ROOT / f"{stem.replace('.', '/')}.py" for stem in stems)
        pending += [file for file in files if file.exists()]
    assert len(seen) > 3


@pytest.mark.parametrize("path", FILES, ids=name)
def test_files_and_functions_are_short(path):
    assert len(path.read_text().splitlines()) <= 300
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not is_jit(node):
            assert node.end_lineno - node.lineno < 60, node.name


def test_line_counts_are_printed(capsys):
    sizes = dict.fromkeys(PACKAGES, 0)
    for path in FILES:
        sizes[path.relative_to(ROOT).parts[0]] += len(path.read_text().splitlines())
    with capsys.disabled():
        # to stderr, since pytest-xdist drops stdout of its workers
        counts = ", ".join(f"{package} {size}" for package, size in sizes.items())
        print(f"\nlines: {counts}", file=sys.stderr)
    assert all(sizes.values())


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_state_in_modules_or_classes(path):
    module = tree(path)
    assert not [node for node in ast.walk(module) if isinstance(node, ast.Global)]
    for node in module.body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = {target.id for target in targets if isinstance(target, ast.Name)}
            # only constants, types and loggers are allowed
            assert all(
                n.isupper() or n[0].isupper() or n in ("logger", "__all__") for n in names
            ), names
    mutable = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
    for node in ast.walk(module):
        if not isinstance(node, ast.ClassDef) or _is_schema(node):
            continue
        for part in node.body:
            value = getattr(part, "value", None)
            assert not isinstance(value, mutable), f"{node.name} has a mutable attribute"


def _is_schema(node: ast.ClassDef) -> bool:
    # pydantic copies mutable field defaults for every instance
    return any(
        ast.unparse(base) in ("BaseModel", "RequestBody", "GenerationOptions")
        for base in node.bases
    )


@pytest.mark.parametrize("path", FILES, ids=name)
def test_the_environment_is_read_in_one_place(path):
    reads = re.search(r"os\.(environ|getenv|putenv)", path.read_text())
    # a benchmark passes its environment to the server that it starts
    assert not reads or name(path) in ("server/config.py", "benchmarks/startup.py")


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_file_shadows_another_module(path):
    # a file that runs as a script hides the top-level module of the same name
    taken = sys.stdlib_module_names | {"torch", "triton", "fastapi", "tokenizers", "safetensors"}
    assert path.stem not in taken or path.stem == "__init__"
    assert path.stem not in dir(builtins)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_todo_and_no_pickle(path):
    text = path.read_text()
    assert not re.search(r"#\s*(TODO|FIXME|XXX|HACK)\b", text)
    assert "raise NotImplementedError" not in text
    # one restricted reader, which only a conversion that a user starts may use
    assert not re.search(r"\b(import|from) pickle\b", text) or path.stem == "record_pickle"
    assert not re.search(r"\bpickle\.(loads?|Unpickler)\(|torch\.load\(", text)
    readers = "lingua", "sparse_memory", "distributed_checkpoint"
    opens = re.search(rf"importers(\.| import )({'|'.join(readers)})\b", text)
    assert not opens or path.stem in ("convert", *readers)


@pytest.mark.parametrize("path", FILES + TESTS, ids=name)
def test_every_file_has_a_docstring(path):
    docstring = ast.get_docstring(tree(path))
    assert docstring and docstring.splitlines()[0].endswith(".")


def test_the_file_map_matches_the_tree():
    text = (ROOT / "docs/structure.md").read_text()
    mapped = dict(re.findall(r"^    (\S+\.py) +(\S.*)$", text, re.MULTILINE))
    files = [path for path in FILES if path.name != "__init__.py"]
    lines = {name(path): ast.get_docstring(tree(path)).splitlines()[0] for path in files}
    assert mapped == lines


def references(path: Path) -> set[str]:
    """Modules of ours that a file imports, or names in strings that other processes run."""
    words = [
        node.value
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    named = re.findall(rf"\b(?:{'|'.join((*PACKAGES, 'tests'))})(?:\.\w+)+", " ".join(words))
    return {*imports(path), *named}


@functools.cache
def reached(path: Path) -> frozenset[Path]:
    """Files of ours that a file imports, directly or not."""
    seen: set[Path] = set()
    ahead = [path]
    while ahead:
        for module in references(ahead.pop()):
            # "package.module" or "package.module.name"
            parts = module.split(".")
            for part in (parts, parts[:-1]):
                file = ROOT.joinpath(*part).with_suffix(".py")
                if part and file in MODULES and file not in seen:
                    seen.add(file)
                    ahead.append(file)
    return frozenset(seen)


TESTED = [f for f in FILES if f.relative_to(ROOT).parts[0] != "benchmarks"]


@pytest.mark.parametrize("path", [f for f in TESTED if f.name != "__init__.py"], ids=name)
def test_every_file_has_its_test_or_names_the_one_that_covers_it(path):
    own = ROOT / "tests" / path.relative_to(ROOT).parent / f"test_{path.name}"
    covering = COVERED_BY.get(name(path))
    assert own.exists() != (covering is not None), (
        "needs a mirrored test file, or an entry in COVERED_BY"
    )
    test = own if covering is None else ROOT / "tests" / covering
    assert test.exists() and path in reached(test)


def test_no_file_is_covered_that_does_not_exist():
    assert not set(COVERED_BY) - {name(path) for path in TESTED}


@pytest.mark.parametrize("path", [p for p in TESTS if p.name.startswith("test_")], ids=name)
def test_every_test_can_fail_and_none_sleeps(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            body = ast.unparse(node)
            assert re.search(
                r"\bassert\b|raises|assert_close|check\(|close\(|refused\(|load_model|expect\(",
                body,
            )
    assert "time" + ".sleep" not in path.read_text()
