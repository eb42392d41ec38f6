"""Muon on the matrices between layers, AdamW on everything else, as one optimizer for the Trainer."""

import math

import torch
from torch import nn


class Muon(torch.optim.Muon):
    """
    `torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"` and Nesterov momentum, that orthogonalizes on CPUs in
    float32, since those without bfloat16 arithmetic take many times as long in it, as torch's own does.
    """

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(weight.grad)
                momentum = state["momentum_buffer"].lerp_(weight.grad, 1 - group["momentum"])
                update = weight.grad.lerp(momentum, group["momentum"])
                update = update.float() if update.device.type == "cpu" else update.bfloat16()
                update = orthogonalize(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(weight.shape)))


def orthogonalize(
    matrix: torch.Tensor, coefficients: tuple[float, float, float], num_steps: int, eps: float
) -> torch.Tensor:
    """
    Brings a matrix near to the orthogonal one with its singular vectors, by Newton-Schulz steps of the fifth order
    ([Jordan, 2024](https://kellerjordan.github.io/posts/muon)).

    Args:
        matrix (`torch.Tensor` of shape `(rows, columns)`): The matrix, in the dtype to compute in.
        coefficients (`tuple[float, float, float]`): Of the first, third and fifth power.
        num_steps (`int`): The number of steps.
        eps (`float`): The least norm to divide by.

    Returns:
        `torch.Tensor` of shape `(rows, columns)`.
    """
    first, third, fifth = coefficients
    is_tall = matrix.shape[0] > matrix.shape[1]
    matrix = matrix.T if is_tall else matrix
    matrix = matrix / matrix.norm().clamp(min=eps)
    for _ in range(num_steps):
        gram = matrix @ matrix.T
        matrix = torch.addmm(matrix, torch.addmm(gram, gram, gram, beta=third, alpha=fifth), matrix, beta=first)
    return matrix.T if is_tall else matrix


class MuonAdamW(torch.optim.Optimizer):
    """
    [`Muon`] on a model's hidden matrices and `torch.optim.AdamW` on its embeddings, heads, convolutions, norms and
    biases. Muon's updates are scaled to AdamW's, so one learning rate and one schedule serve both. Needs torch 2.9 or
    later.

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
            muon = Muon(hidden, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
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
