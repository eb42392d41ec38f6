"""Publishing checkpoints on the Hub, with a model card made from what was measured."""

from .card import build_card
from .push import push_checkpoint


__all__ = ["build_card", "push_checkpoint"]
