"""Prepares the pages of `make docs`: hooks of MkDocs, and an extension of Griffe for transformers' docstrings."""

import dataclasses
import importlib
import re
import sys
from pathlib import Path

import griffe
from mkdocs.structure.files import File


FROM_THE_ROOT = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


def on_startup(**kwargs):
    """Makes the repository, whatever its folder is called, importable as the package."""
    link = Path("outputs/package/tokenflex")
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(Path.cwd())
    sys.path.insert(0, str(link.parent.absolute()))


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
    """Makes links of ``[`Name`]``, keeps what is said of an argument's type, and lists the fields of dataclasses."""

    def on_package(self, *, pkg, **kwargs):
        pages = "\n".join(page.read_text(encoding="utf-8") for page in Path("docs/api").glob("*.md"))
        shown = [pkg[path] for path in re.findall(r"^::: tokenflex\.(.+)", pages, re.MULTILINE)]
        objects, found = {}, shown
        while found:
            objects |= {member.path: member for member in found if member.has_docstring}
            found = [member for parent in found for member in parent.members.values()]
            found = [member for member in found if not member.is_alias and re.match("[a-zA-Z]|__call__", member.name)]
        for module in shown:
            module.exports = None  # documented once, in the module that defines it

        def link(match):
            path = next((path for path in objects if f".{path}".endswith(f".{match[1]}")), match[1])
            return f"`{path}`" if path.startswith(("transformers.", "huggingface_hub.")) else f"[`{match[1]}`][{path}]"

        for documented in objects.values():
            if "dataclass" in documented.labels:
                fields = dataclasses.fields(getattr(importlib.import_module(documented.module.path), documented.name))
                own = [field for field in fields if field.name in documented.members and "help" in field.metadata]
                said = [f"    {field.name}: {field.metadata['help']}" for field in own]
                documented.docstring.value += "\n\nArgs:\n" + "\n".join(said) if said else ""
            documented.docstring.value = re.sub(r"\[`~?([\w.]+)`\](?![(\[])", link, documented.docstring.value)
            sections = documented.docstring.parsed
            for place, section in enumerate(sections):
                if section.kind.value == "returns":
                    sections[place] = griffe.DocstringSectionText(f"**Returns:** {section.value[0].description}")
                for entry in section.value if section.kind.value == "parameters" else []:
                    if isinstance(entry.annotation, str):
                        entry.description, entry.annotation = f"({entry.annotation}) {entry.description}", None
