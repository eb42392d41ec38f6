import ast
import inspect
import re
import runpy
from pathlib import Path

import pytest

import tokenflex
from tokenflex import evaluation, training


ROOT = Path(__file__).parents[1]
ROOMS = ("checkpoints", "data", "towers", "training", "evaluation", "hub", "inference", "research")
REFERENCE = runpy.run_path(str(ROOT / "docs/build_reference.py"))
PUBLIC = {
    f"{found.__module__}.{name}": found
    for page in REFERENCE["PAGES"]
    for name, found in REFERENCE["public_names"](page).items()
}
DOCUMENTED = {
    title: member
    for name, found in PUBLIC.items()
    for title, member in {name: found, **{f"{name}.{m}": f for m, f in REFERENCE["members"](found).items()}}.items()
}


def named_arguments(docstring):
    """The names before the type, or the colon, of each entry under `Args:`."""
    entries = [entry for title, lines in REFERENCE["sections"](docstring) if title == "Args" for entry in lines]
    return [name.strip() for entry in entries for name in re.split(r" \(|:", entry)[0].split(",")]


def inherited_arguments(name):
    """Those that a method has from the library's method that it overrides, which documents them."""
    owner = PUBLIC.get(name.rpartition(".")[0])
    bases = [base for base in inspect.getmro(owner) if not base.__module__.startswith("tokenflex")] if owner else []
    overridden = [vars(base)[method] for base in bases if (method := name.rpartition(".")[2]) in vars(base)]
    return {n for found in overridden for n in inspect.signature(REFERENCE["function"](found)).parameters}


def faults(found, elsewhere=()):
    """The arguments that a docstring misses, and those that it names although they are not there."""
    docstring = REFERENCE["function"](found).__doc__ or ""
    arguments = REFERENCE["arguments"](found)
    names = [name for name in arguments if not name.startswith("*")]
    named = [name.lstrip("*") for name in named_arguments(docstring)]
    known = {*named, *elsewhere}
    if not named:
        known.update(re.findall(r"`(\w+)`", docstring))
    if delegate := re.search(r"(?:Args as in|[Aa]rguments as (?:in|for)|^See) \[`(?:\w+\.)*(\w+)`\]", docstring):
        titles = [title for title in DOCUMENTED if title.split(".")[-1] == delegate[1]]
        known.update(name for title in titles for name in named_arguments(DOCUMENTED[title].__doc__))
    fields = getattr(found, "__dataclass_fields__", {})
    known.update(name for name, field in fields.items() if "help" in field.metadata)
    return {
        "missing": [name for name in names if name not in known],
        "stale": [name for name in named if name not in {argument.lstrip("*") for argument in arguments}],
        "twice": sorted({name for name in named if named.count(name) > 1}),
    }


def test_the_committed_reference_is_what_the_docstrings_make():
    committed = {path.stem: path.read_text() for path in (ROOT / "docs/reference").glob("*.md")}
    assert committed == REFERENCE["pages"](), "run `make reference`"


def test_all_that_packages_export_is_in_the_reference():
    exported = {getattr(package, name) for package in (tokenflex, training, evaluation) for name in package.__all__}
    assert exported <= set(PUBLIC.values())


def test_links_lead_to_headings():
    pages = REFERENCE["pages"]()
    headings = {page: re.findall(r"^#+ `(.+)`$", text, re.MULTILINE) for page, text in pages.items()}
    anchors = {f"{page}.md#{title.lower().replace('.', '')}" for page, titles in headings.items() for title in titles}
    links = {link for text in pages.values() for link in re.findall(r"\]\((\w+\.md#\w+)\)", text)}
    assert links and links <= anchors


@pytest.mark.parametrize("name", DOCUMENTED)
def test_docstring_names_the_arguments(name):
    found = DOCUMENTED[name]
    assert REFERENCE["function"](found).__doc__ and not found.__doc__.startswith(f"{name.split('.')[-1]}("), "none"
    assert faults(found, inherited_arguments(name)) == {"missing": [], "stale": [], "twice": []}


def test_the_check_finds_faults():
    def function(first, second=None, **options):
        """
        Args:
            first (`int`): There.
            third (`int`): Not there.
        """

    assert faults(function) == {"missing": ["second"], "stale": ["third"], "twice": []}


def raised_messages():
    """A pattern for every message that the package raises, with anything in the place of a value."""

    def pattern(node):
        if isinstance(node, ast.Constant):
            return re.escape(str(node.value))
        if isinstance(node, ast.JoinedStr):
            return "".join(map(pattern, node.values))
        return pattern(node.left) + pattern(node.right) if isinstance(node, ast.BinOp) else ".*"

    for path in [*ROOT.glob("*.py"), *(path for room in ROOMS for path in ROOT.glob(f"{room}/*.py"))]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                message = pattern(node.exc.args[0])
                if message.replace(".*", ""):
                    yield message


MESSAGES = list(raised_messages())


@pytest.mark.parametrize("said", re.findall(r"```text\n(.*)\n```", (ROOT / "docs/faq.md").read_text()))
def test_errors_in_the_documentation_are_raised(said):
    message = re.sub(r"^\S+, row \d+: (.*)\.$", r"\1", said)  # how a row's reason is told
    assert any(re.fullmatch(pattern, message) for pattern in MESSAGES)
