import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

import tokenflex
from tokenflex import evaluation, hub, training


ROOT = Path(__file__).parents[1]
ROOMS = [path.parent.name for path in ROOT.glob("*/__init__.py")]
FILES = [*ROOT.glob("*_tokenflex.py"), *(path for room in ROOMS for path in ROOT.glob(f"{room}/[a-z]*.py"))]
FILES.remove(ROOT / "inference/vllm_model.py")  # imports vLLM, and is what its backend asks for
MODULES = [".".join(["tokenflex", *path.relative_to(ROOT).with_suffix("").parts]) for path in sorted(FILES)]
SHOWN = [
    line for page in ROOT.glob("docs/api/*.md") for line in re.findall(r"^::: (.+)", page.read_text(), re.MULTILINE)
]
EXPORTED = {getattr(package, name) for package in (tokenflex, training, evaluation, hub) for name in package.__all__}


def documented(owner):
    """The functions and classes of a module or class that have a docstring of their own, methods after their class."""
    for name, member in vars(owner).items():
        member = inspect.unwrap(getattr(member, "__func__", member))
        own = getattr(member, "__module__", None) == getattr(owner, "__module__", owner.__name__)
        if own and member.__doc__ and (name[0] != "_" or name == "__call__"):
            if inspect.isclass(member):
                yield member, [base for base in member.__mro__ if not base.__module__.startswith("tokenflex")]
                yield from documented(member)
            elif inspect.isfunction(member):
                bases = [base for base in getattr(owner, "__mro__", []) if not base.__module__.startswith("tokenflex")]
                yield member, [getattr(base, name) for base in bases if name in vars(base)]


def parameters(found):
    try:
        listed = inspect.signature(found).parameters.values()
    except ValueError:  # exceptions and dictionaries have none
        return []
    return [arg for arg in listed if arg.name not in ("self", "cls")]


def named_arguments(found):
    """The names under `Args:`, and those of a dataclass's fields that have a `help`."""
    listed = re.findall(r"^Args:\n((?: {4}.*\n|\n)+)", inspect.cleandoc(found.__doc__) + "\n", re.MULTILINE)
    names = [names for part in listed for names in re.findall(r"^ {4}([\w*][\w*, ]*?)(?: \(|:)", part, re.MULTILINE)]
    fields = getattr(found, "__dataclass_fields__", {}).values()
    names += [field.name for field in fields if "help" in field.metadata]
    return [name.strip("* ") for several in names for name in several.split(",")]


def faults(found, overridden=()):
    """The arguments that a docstring misses, those that it names although they are not there, and those it repeats."""
    named, arguments = named_arguments(found), parameters(found)
    known = {arg.name for base in overridden for arg in parameters(base)}  # the library's documentation has them
    known.update(named or re.findall(r"`(\w+)`", found.__doc__))
    required = [arg.name for arg in arguments if arg.kind not in (arg.VAR_POSITIONAL, arg.VAR_KEYWORD)]
    if re.search(r"(Args as in|[Aa]rguments as (in|for)|See) \[`", found.__doc__):
        required = []
    stale = [name for name in named if name not in [arg.name for arg in arguments]]
    return [*(name for name in required if name not in known), *stale, *{n for n in named if named.count(n) > 1}]


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith(tuple(SHOWN))])
def test_docstrings_name_the_arguments(name):
    """All of them where a docstring lists arguments, and where a package exports the name, its methods included."""
    module = importlib.import_module(name)
    exported = {found.__qualname__ for found in EXPORTED if found.__module__ == name}
    found = {
        member.__qualname__: faults(member, overridden)
        for member, overridden in documented(module)
        if named_arguments(member) or member.__qualname__.split(".")[0] in exported
    }
    assert not {name: found[name] for name in found if found[name]}


def test_every_room_and_core_file_has_a_page():
    core = {f"tokenflex.{path.stem}" for path in ROOT.glob("*_tokenflex.py")}
    assert core | {f"tokenflex.{room}" for room in ROOMS} <= set(SHOWN)


def test_exported_names_have_docstrings():
    assert all(inspect.getdoc(found) and not found.__doc__.startswith(f"{found.__name__}(") for found in EXPORTED)


def test_the_check_finds_faults():
    def function(first, second=None, **options):
        """
        Args:
            first (`int`): There.
            third (`int`): Not there.
        """

    assert faults(function) == ["second", "third"]


def raised_messages():
    """A pattern for every message that the package raises, with anything in the place of a value."""

    def pattern(node):
        if isinstance(node, ast.Constant):
            return re.escape(str(node.value))
        if isinstance(node, ast.JoinedStr):
            return "".join(map(pattern, node.values))
        return pattern(node.left) + pattern(node.right) if isinstance(node, ast.BinOp) else ".*"

    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                message = pattern(node.exc.args[0])
                if message.replace(".*", ""):
                    yield message


MESSAGES = list(raised_messages())


@pytest.mark.parametrize("said", re.findall(r"```text\n(.*)\n```", (ROOT / "docs/faq.md").read_text()))
def test_errors_in_the_documentation_are_raised(said):
    message = re.sub(r"^\S+, row \d+: (.*)\.$", r"\1", said)  # the reason alone, without file and row
    assert any(re.fullmatch(pattern, message) for pattern in MESSAGES)
