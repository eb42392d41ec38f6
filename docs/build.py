"""Prepares the pages of `make docs`: a hook of MkDocs, and an extension of Griffe that reads transformers' docstrings."""

import ast
import re
from pathlib import Path

import griffe
from mkdocs.structure.files import File


FROM_THE_ROOT = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


def on_startup(**kwargs):
    """Links the repository, whatever its folder is called, under the name that Griffe looks for."""
    link = Path("outputs/package/tokenflex")
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(Path.cwd())


def on_files(files, config):
    """Adds the pages that stand in the repository's root, where readers of the code look for them."""
    for source, page in FROM_THE_ROOT.items():
        files.append(File.generated(config, page, content=Path(source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown, **kwargs):
    """Points links at where the pages stand in the site."""
    for source, page in FROM_THE_ROOT.items():
        markdown = re.sub(rf"\]\((\.\./)?{source}", f"]({page}", markdown)
    return markdown.replace("](docs/", "](")


class TransformersDocstrings(griffe.Extension):
    """Makes links of ``[`Name`]``, keeps what an argument says of itself, and lists the fields of dataclasses."""

    def on_class_instance(self, *, node, cls, **kwargs):
        fields = [line for line in node.body if isinstance(line, ast.AnnAssign)]
        help = {
            field.target.id: value.value
            for field in fields
            for entry in ast.walk(field)
            if isinstance(entry, ast.Dict)
            for key, value in zip(entry.keys, entry.values)
            if isinstance(value, ast.Constant) and ast.literal_eval(key) == "help"
        }
        if help:
            cls.docstring.value += "\n\nArgs:\n" + "\n".join(f"    {name}: {said}" for name, said in help.items())

    def on_package(self, *, pkg, **kwargs):
        pages = "".join(page.read_text(encoding="utf-8") for page in Path("docs/api").glob("*.md"))
        rooms = [pkg[path.partition(".")[2]] for path in re.findall(r"^::: (.+)", pages, re.MULTILINE)]
        objects, found = {}, rooms
        while found:
            objects |= {member.path: member for member in found if member.has_docstring}
            found = [member for parent in found for member in parent.members.values()]
            found = [member for member in found if not member.is_alias and not member.name.startswith("_")]
        for room in rooms:
            room.exports = None  # what a package exports stands once, in its module

        def link(match):
            path = next((path for path in objects if f".{path}".endswith(f".{match[1]}")), None)
            return f"[`{match[1]}`][{path}]" if path else f"`{match[1]}`"

        for documented in objects.values():
            documented.docstring.value = re.sub(r"\[`~?([\w.]+)`\](?![(\[])", link, documented.docstring.value)
            parsed = documented.docstring.parsed
            for place, section in enumerate(parsed):
                if section.kind.value == "returns":
                    parsed[place] = griffe.DocstringSectionText(f"**Returns:** {section.value[0].description}")
                for entry in section.value if section.kind.value == "parameters" else []:
                    if isinstance(entry.annotation, str):
                        entry.description, entry.annotation = f"({entry.annotation}) {entry.description}", None
