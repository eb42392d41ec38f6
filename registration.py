"""
Makes transformers' Auto classes know the model once they are imported, and not before: importing them imports torch. They and
the core may be imported in any order, and each may set off the other's import.
"""

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder


_AUTO = "transformers.models.auto"
# For each module of Auto classes what has to be registered there: (Auto class, our module, our class).
REGISTERED = {
    f"{_AUTO}.configuration_auto": [("AutoConfig", "configuration_tokenflex", "TokenFlexConfig")],
    f"{_AUTO}.modeling_auto": [
        ("AutoModel", "modeling_tokenflex", "TokenFlexModel"),
        ("AutoModelForImageTextToText", "modeling_tokenflex", "TokenFlexForConditionalGeneration"),
        ("AutoModelForMultimodalLM", "modeling_tokenflex", "TokenFlexForConditionalGeneration"),
    ],
    f"{_AUTO}.processing_auto": [("AutoProcessor", "processing_tokenflex", "TokenFlexProcessor")],
}
_WATCHED = {*REGISTERED, *(f"{__package__}.{module}" for classes in REGISTERED.values() for _, module, _ in classes)}
_loading, _registered = set(), set()


class _WatchingLoader(Loader):
    """Loads a module as its own loader does, then registers what can be."""

    def __init__(self, loader: Loader):
        self.loader = loader

    def create_module(self, spec: ModuleSpec):
        return self.loader.create_module(spec)

    def exec_module(self, module) -> None:
        module.__spec__.loader = module.__loader__ = self.loader
        _loading.add(module.__name__)
        try:
            self.loader.exec_module(module)
        finally:
            _loading.discard(module.__name__)
        _register_what_is_loaded()


class _WatchingFinder(MetaPathFinder):
    def find_spec(self, fullname: str, path=None, target=None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname in _WATCHED else None
        if spec is not None:
            spec.loader = _WatchingLoader(spec.loader)
        return spec


def _register_what_is_loaded() -> None:
    for name, classes in REGISTERED.items():
        own = {f"{__package__}.{module}" for _, module, _ in classes}
        if name in _registered or name not in sys.modules or _loading & {name, *own}:
            continue  # a module that is still being loaded comes here again at its end
        _registered.add(name)
        config = importlib.import_module(".configuration_tokenflex", __package__).TokenFlexConfig
        for auto_class, module, own_class in classes:
            value = getattr(importlib.import_module(f".{module}", __package__), own_class)
            key = "tokenflex" if value is config else config
            getattr(sys.modules[name], auto_class).register(key, value, exist_ok=True)


def register_with_auto_classes() -> None:
    """Registers with the Auto classes that are imported already, and sees to it that the others follow."""
    if not any(isinstance(finder, _WatchingFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WatchingFinder())
    _register_what_is_loaded()
