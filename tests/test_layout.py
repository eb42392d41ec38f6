"""What is where: imports run one way between the folders, files stay small, and no name hides another."""

import ast
import importlib
import inspect
import sys
from pathlib import Path

import tokenflex


ROOT = Path(tokenflex.__file__).parent
CORE = sorted(ROOT.glob("*_tokenflex.py"))
ROOMS = {path.parent.name: sorted(path.parent.glob("*.py")) for path in ROOT.glob("*/__init__.py")}
FILES = {path.relative_to(ROOT).as_posix(): path for path in [*ROOT.glob("*.py"), *sum(ROOMS.values(), [])]}
# Each row may import of the rows above it.
ROWS = (
    {"core"},
    {"__init__"},
    {"checkpoints", "data"},
    {"towers", "inference"},
    {"evaluation"},
    {"hub"},
    {"training"},
    {"research"},
    {"cli"},
    {"__main__"},
)
HEIGHTS = {room: height for height, row in enumerate(ROWS) for room in row}


def room_of(module):
    """The folder of a module, given as the parts of its name behind `tokenflex`; of one in the root, its own name."""
    if module and module[0] in ROOMS:
        return module[0]
    if module and (ROOT / f"{module[0]}.py").exists():
        return "core" if module[0].endswith("_tokenflex") else module[0]
    return "__init__"


def imported_by(path):
    """The modules and names of this package that a file imports, as parts behind `tokenflex`."""
    here = ["tokenflex", *path.relative_to(ROOT).with_suffix("").parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = [*(here[: -node.level] if node.level else []), *(node.module.split(".") if node.module else [])]
            names = [[*module, alias.name] for alias in node.names]
        else:
            continue
        yield from (name[1:] for name in names if name[0] == "tokenflex")


def longer_than(limit, paths):
    sizes = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in paths}
    return {name: size for name, size in sizes.items() if size > limit}


def test_imports_run_one_way():
    assert HEIGHTS.keys() - {"core", "__init__", "cli", "__main__"} == ROOMS.keys()
    upward = []
    for file, path in FILES.items():
        own = room_of(Path(file).with_suffix("").parts)
        for name in imported_by(path):
            room = room_of(name)
            if room != own and HEIGHTS[room] >= HEIGHTS[own]:
                upward.append(f"{file} imports {'.'.join(name)}")
    assert upward == []


def test_root_and_core_are_small():
    assert len(list(ROOT.glob("*.py"))) <= 14
    assert len(CORE) <= 7
    assert sum(longer_than(0, CORE).values()) <= 2960
    assert longer_than(550, CORE) == {}


def test_other_files_are_small():
    assert longer_than(450, set(FILES.values()) - set(CORE)) == {}


def test_no_name_hides_a_module():
    stems = {file: path.stem for file, path in FILES.items() if path.stem not in ("__init__", "__main__")}
    assert [file for file, stem in stems.items() if stem in sys.stdlib_module_names] == []
    hidden = []
    for file, stem in stems.items():
        package = importlib.import_module(".".join(["tokenflex", *Path(file).parts[:-1]]))
        if not inspect.ismodule(getattr(package, stem, sys)):  # absent until it is imported
            hidden.append(file)
    assert hidden == []
