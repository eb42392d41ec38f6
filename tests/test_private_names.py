"""Private parts of other libraries, which any release may take away: few, and each with its reason."""

import ast
import importlib
import inspect
from functools import reduce
from pathlib import Path

import pytest
import transformers

import tokenflex


ROOT = Path(tokenflex.__file__).parent
FILES = [*ROOT.glob("*.py"), *(path for room in ROOT.glob("*/__init__.py") for path in room.parent.glob("*.py"))]
# Each with the module that has it, its place there, and what it is for.
PRIVATE = {
    "_apply_liger_kernel_to_instance": (
        "liger_kernel.transformers",
        "_apply_liger_kernel_to_instance",
        "training/liger.py replaces parts of a language model that exists; public functions do before it does.",
    ),
}
# Set or read by models and processors inside transformers as well: part of its form for models, private in name only.
HOOKS = {
    "_attn_implementation",
    "_can_compile_fullgraph",
    "_get_num_multimodal_tokens",
    "_init_weights",
    "_keys_to_ignore_on_load_unexpected",
    "_no_split_modules",
    "_process_images",
    "_skip_keys_device_placement",
    "_supports_attention_backend",
    "_supports_flash_attn",
    "_supports_flex_attn",
    "_supports_sdpa",
    "_tied_weights_keys",
    "_tp_plan",
}
# Underscores that their libraries document: of named tuples, of `os`, and what an `evaluate` metric defines.
PUBLIC = {"_asdict", "_compute", "_exit", "_info", "_replace"}
LEFT_BEHIND = {"_abc_impl", "_auto_class"}  # by `ABC` and `register_for_auto_class` on classes of ours


def is_private(name):
    return name.startswith("_") and not name.startswith("__") and name != "_"


def names_in(path):
    """The private names that a file defines, and those that it uses."""
    defined, used = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name, ctx=ast.Store()):
                defined.add(name)
            case ast.Name(id=name, ctx=ast.Store()) | ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                defined.add(name)
            case ast.Attribute(attr=name):
                used.add(name)
            case ast.Call(
                func=ast.Name(id="getattr" | "hasattr" | "setattr" | "delattr"), args=[_, ast.Constant(name), *_]
            ):
                used.add(name)
            case ast.ImportFrom(module=module, names=aliases):
                used.update((module or "").split("."), (alias.name for alias in aliases))
            case ast.Import(names=aliases):
                used.update(part for alias in aliases for part in alias.name.split("."))
    return set(filter(is_private, defined)), set(filter(is_private, used))


def overrides_in(path):
    """Private names that a file's classes define and a base class from elsewhere has too."""
    module = ".".join(["tokenflex", *path.relative_to(ROOT).with_suffix("").parts])
    try:
        classes = inspect.getmembers(importlib.import_module(module), inspect.isclass)
    except ImportError as error:  # an extra that is not installed
        assert error.name.partition(".")[0] != "tokenflex"
        return set()
    found = set()
    for _, owner in classes:
        if owner.__module__ == module:
            bases = owner.__mro__[1:]
            own = [base for base in bases if base.__module__.startswith("tokenflex.")]
            foreign = {name for base in bases if base not in own for name in vars(base)}
            found |= {name for base in (owner, *own) for name in vars(base) if is_private(name)} & foreign
    return found


def private_names(files):
    """Each private name of another library in use, with the files that use it."""
    names = {path: names_in(path) for path in files}
    overridden = {path: overrides_in(path) for path in files if path.stem not in ("__init__", "__main__", "setup")}
    own = set().union(*(defined for defined, _ in names.values()))
    places = {}
    for path, (_, used) in names.items():
        for name in (used - own) | overridden.get(path, set()):
            places.setdefault(name, []).append(path.relative_to(ROOT).as_posix())
    return {name: sorted(places[name]) for name in sorted(places.keys() - HOOKS - PUBLIC - LEFT_BEHIND)}


def test_no_other_private_name_is_in_use():
    found = private_names(FILES)
    unlisted = [f"{name} in {', '.join(places)}" for name, places in found.items() if name not in PRIVATE]
    assert not unlisted, "\n".join(unlisted)
    assert PRIVATE.keys() <= found.keys(), "listed, but no longer in use"


def test_few_are_in_use():
    core = [name for name, places in private_names(FILES).items() if any("_tokenflex.py" in place for place in places)]
    assert len(core) <= 3 and len(PRIVATE) <= 8


@pytest.mark.parametrize("name", PRIVATE)
def test_release_still_has(name):
    module, place, purpose = PRIVATE[name]
    found = reduce(lambda value, part: getattr(value, part, None), place.split("."), pytest.importorskip(module))
    assert found is not None, f"{module}.{place} is gone. {purpose}"


@pytest.mark.parametrize("name", sorted(HOOKS))
def test_models_inside_transformers_have_the_hook(name):
    models = Path(transformers.__file__).parent / "models"
    assert any(name in path.read_text() for path in sorted(models.glob("[i-q]*/*.py"))), (
        f"no model has {name} any more"
    )
