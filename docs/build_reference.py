"""Writes docs/reference/*.md from the docstrings: `python docs/build_reference.py`, or `make reference`."""

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
from pathlib import Path


NOTE = "<!-- Written by docs/build_reference.py from the docstrings: edit these, then run `make reference`. -->"
CORE = " ".join(
    f"{name}_tokenflex"
    for name in ("configuration", "modeling", "processing", "placeholders", "packing", "image_cache")
)
FILES = "checkpoints.files towers.build checkpoints.provenance inference.ask"
COLLATOR = "collator callback trainer publishing arguments train"
DATA = "data.loading data.examples training.sampling training.optimization training.lora data.synthetic towers.tiny"
SCORES = "evaluator sweep metrics hub_metrics intervals cost calibrate report"
PAGES = {
    "core": f"{CORE} {FILES}",
    "training": " ".join(f"training.{name}" for name in COLLATOR.split()) + f" {DATA}",
    "evaluation": " ".join(f"evaluation.{name}" for name in SCORES.split()),
    "hub": "hub.card hub.checkpoint hub.push",
}


def public_names(page: str) -> dict:
    """What a page's modules make public: their `__all__`, else what they define, command lines left out."""
    found = {}
    for module in [importlib.import_module(f"tokenflex.{name}") for name in PAGES[page].split()]:
        own = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
        own = [name for name in own if name not in ("main", "make_parser", "calibrate_checkpoint") and name[0] != "_"]
        found |= {name: getattr(module, name) for name in getattr(module, "__all__", own)}
    return found


def function(member):
    return inspect.unwrap(getattr(member, "fget", None) or getattr(member, "__func__", member))


def members(found) -> dict:
    """The public methods and properties of a class, and its `__call__`, where this package documents them."""
    bases = [vars(base) for base in reversed(found.__mro__)] if inspect.isclass(found) else []
    own = {name: member for base in bases for name, member in base.items() if name == "__call__" or name[0] != "_"}
    own = {name: own[name] for name in own if inspect.isfunction(function(own[name])) and function(own[name]).__doc__}
    return {name: own[name] for name in own if function(own[name]).__module__.startswith("tokenflex")}


def arguments(found) -> dict[str, str]:
    """Every argument as it is written, by name, `self` and `cls` left out; of a dataclass its own fields."""
    node = ast.parse(textwrap.dedent(inspect.getsource(function(found)))).body[0]
    if dataclasses.is_dataclass(found) or (inspect.isclass(found) and issubclass(found, tuple)):
        lines = [line for line in node.body if isinstance(line, ast.AnnAssign)]
        own = list(getattr(found, "__dataclass_fields__", {}).values())
        made = [f.default if f.default_factory is dataclasses.MISSING else f.default_factory() for f in own]
        default = {f.name: f" = {value!r}" for f, value in zip(own, made) if value is not dataclasses.MISSING}
        fields = {line.target.id: f"{line.target.id}: {ast.unparse(line.annotation)}" for line in lines}
        return {name: text + default.get(name, "") for name, text in fields.items()}
    if inspect.isclass(found):
        bases = [vars(base) for base in found.__mro__ if base.__module__.startswith("tokenflex")]
        return next((arguments(base["__init__"]) for base in bases if "__init__" in base), {})
    args, positional = node.args, [*node.args.posonlyargs, *node.args.args]
    default = dict(zip(positional[::-1], args.defaults[::-1])) | dict(zip(args.kwonlyargs, args.kw_defaults))
    default = {arg: f" = {ast.unparse(value)}" for arg, value in default.items() if value}
    star = args.vararg or (ast.arg("") if args.kwonlyargs else None)
    groups = [("", positional), ("*", [star]), ("", args.kwonlyargs), ("**", [args.kwarg])]
    found = [(prefix, arg) for prefix, group in groups for arg in group if arg and arg.arg not in ("self", "cls")]
    return {prefix + arg.arg: prefix + ast.unparse(arg) + default.get(arg, "") for prefix, arg in found}


def signature(name: str, found) -> str:
    written = list(arguments(found).values())
    text = ", ".join(written) if len(written) < 3 else "\n    " + ",\n    ".join(written) + ",\n"
    return f"```py\n{name if isinstance(found, property) else f'{name}({text})'}\n```"


def sections(doc: str) -> list[tuple[str, list[str]]]:
    """A docstring in parts: lines of prose, which has no title, and entries of arguments, results or errors."""
    pattern = r"^(Args|Attributes|Returns|Raises|Yields):\n((?: {4}.*\n|\n(?= {4}))+)"
    prose, *titled = re.split(pattern, inspect.cleandoc(doc) + "\n", flags=re.MULTILINE)
    parts = [("", prose.splitlines())]
    for title, body, after in zip(titled[::3], titled[1::3], titled[2::3]):
        entries = re.sub(r"\n {5,}", " ", body).splitlines()
        parts += [(title, [entry.strip() for entry in entries if entry.strip()]), ("", after.splitlines())]
    return parts


def markdown(found, links: dict[str, str]) -> str:
    text = []
    for title, lines in sections(function(found).__doc__ or ""):
        if title in ("Args", "Attributes", "Raises"):
            lines = [re.sub(r"^([\w*, ]+?)(?= \(|:)", r"- `\1`", line) for line in lines]
        heading = f"**{'Arguments' if title == 'Args' else title}**\n\n" if title else ""
        text.append(heading + "\n".join(lines).strip().replace("```python", "```pycon"))
    if fields := getattr(found, "__dataclass_fields__", {}):
        own = [(name, fields[name].metadata.get("help")) for name in arguments(found)]
        text.append("\n".join(f"- `{name}`: {said}" for name, said in own if said))

    def link(match):
        name = match[1] if match[1] in links else match[1].split(".")[-1]
        return f"[`{name}`]({links[name]})" if name in links else f"`{match[1]}`"

    return re.sub(r"\[`~?([\w.]+)`\](?!\()", link, "\n\n".join(part for part in text if part))


def pages() -> dict[str, str]:
    texts, links, public = {}, {}, {page: public_names(page) for page in PAGES}
    for page, names in public.items():
        for title in [t for name, found in names.items() for t in (name, *(f"{name}.{m}" for m in members(found)))]:
            links[title] = f"{page}.md#{title.lower().replace('.', '')}"
    for page, names in public.items():
        text = [NOTE, f"# {page.capitalize()}", " · ".join(f"[`{name}`](#{name.lower()})" for name in names)]
        for name, found in names.items():
            text += [f"## `{name}`", f"in `{found.__module__}`", signature(name, found), markdown(found, links)]
            for member, method in members(found).items():
                text += [f"### `{name}.{member}`", signature(member, method), markdown(method, links)]
        texts[page] = "\n\n".join(text) + "\n"
    return texts


if __name__ == "__main__":
    for page, text in pages().items():
        (Path(__file__).parent / f"reference/{page}.md").write_text(text, encoding="utf-8")
