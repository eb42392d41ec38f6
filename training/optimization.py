"""Muon on the matrices between layers, AdamW on everything else, as one optimizer for the Trainer."""

import torch
from torch import nn


class MuonAdamW(torch.optim.Optimizer):
    """
    `torch.optim.Muon` on a model's hidden matrices and `torch.optim.AdamW` on its embeddings, heads, convolutions,
    norms and biases. Muon's updates are scaled to AdamW's (`adjust_lr_fn="match_rms_adamw"`), so one learning rate and
    one schedule serve both. Needs torch 2.9 or later.

    Args:
        model (`torch.nn.Module`): The model; parameters that do not require gradients are left out.
        lr (`float`): The learning rate.
        weight_decay (`float`, *optional*, defaults to 0.01): Decay of matrices; norms and biases have none.

    Example:

    ```python
    >>> from torch import nn
    >>> from tokenflex.training.optimization import MuonAdamW

    >>> optimizer = MuonAdamW(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), lr=1e-3)
    >>> [len(group["params"]) for group in optimizer.param_groups]
    [1, 3]
    ```
    """

    def __init__(self, model: nn.Module, lr: float, weight_decay: float = 0.01):
        hidden, other, plain = [], [], []
        embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)} | {
            id(parameter)
            for name, parameter in model.named_parameters()
            if name.split(".")[-2:-1] in (["head"], ["lm_head"])
        }
        for parameter in model.parameters():
            if not parameter.requires_grad:
                continue
            if parameter.ndim == 2 and id(parameter) not in embeddings:
                hidden.append(parameter)
            else:
                (other if parameter.ndim > 1 else plain).append(parameter)
        self.parts = []
        if hidden:
            muon = torch.optim.Muon(hidden, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
            self.parts.append(muon)
        groups = [
            {"params": params, "weight_decay": decay}
            for params, decay in ((other, weight_decay), (plain, 0.0))
            if params
        ]
        if groups:
            self.parts.append(torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98)))
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def _share(self):
        """The parts step on this optimizer's groups and state, so that schedulers and checkpoints see one."""
        position = 0
        for part in self.parts:
            part.state = self.state
            part.param_groups = self.param_groups[position : position + len(part.param_groups)]
            position += len(part.param_groups)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self._share()
