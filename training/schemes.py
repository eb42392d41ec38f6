"""What a step trains on: one drawn count, one per sample, or all of them at once."""

from collections.abc import Sequence

import torch
from torch.nn import functional


SCHEMES = {
    "batch": "one count drawn for each micro-batch (paper)",
    "sample": "one count drawn for each sample",
    "nested": "every count in every step, behind one pass of the vision tower; losses averaged by weight",
    "distill": "as nested, and the answers at smaller counts follow the distribution at the largest",
}


class NestedLoss:
    """
    The loss of a batch that holds every sample at several counts: the mean of the counts' losses by weight, and with
    distillation the divergence of each smaller count's answers from the largest count's. It takes the place of a
    model's `loss_function`; batches that were not nested get the function it replaces.

    Args:
        fallback (`Callable`): The model's own loss function.
        weights (`Sequence[float]`): One weight per count; they need not sum to one.
        teacher (`int`): The position of the largest count.
        distillation_weight (`float`, *optional*, defaults to 0.0):
            The weight of the divergence beside the loss; 0 turns it off.
        temperature (`float`, *optional*, defaults to 1.0):
            What logits are divided by before they are compared; the divergence is scaled by its square, so that the
            size of its gradient stays ([Hinton et al., 2015](https://huggingface.co/papers/1503.02531)).

    Example:

    ```python
    >>> import torch
    >>> from tokenflex.training.schemes import NestedLoss

    >>> loss = NestedLoss(fallback=None, weights=[1, 3], teacher=1)
    >>> loss.rows = torch.tensor([[0, 0], [1, 1]])
    >>> logits, labels = torch.tensor([[[0.0, 0.0], [0, 0]], [[0, 9], [0, 0]]]), torch.tensor([[-100, 1], [-100, 1]])
    >>> round(loss(logits, labels, vocab_size=2).item(), 3)
    0.173
    ```
    """

    def __init__(
        self,
        fallback,
        weights: Sequence[float],
        teacher: int,
        distillation_weight: float = 0.0,
        temperature: float = 1.0,
    ):
        self.fallback = fallback
        self.weights = [weight / sum(weights) for weight in weights]
        self.teacher = teacher
        self.distillation_weight = distillation_weight
        self.temperature = temperature
        self.rows = None

    def __call__(self, logits, labels, vocab_size, num_items_in_batch=None, **kwargs):
        """
        Args:
            logits (`torch.Tensor` of shape `(batch_size, sequence_length, vocab_size)`): The model's.
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`): Not yet shifted.
            vocab_size (`int`): The width of `logits`.
            num_items_in_batch (`int` or `torch.Tensor`, *optional*):
                The labelled tokens, each sample counted once, of all micro-batches of the step.
        """
        if self.rows is None:
            return self.fallback(
                logits=logits, labels=labels, vocab_size=vocab_size, num_items_in_batch=num_items_in_batch, **kwargs
            )
        rows, self.rows = self.rows, None
        labelled = labels[:, 1:] != -100
        # Sorted by the row they came from, every count has the same tokens in the same order.
        order = rows[:, 1:][labelled].argsort(stable=True)
        counts = len(self.weights)
        targets = labels[:, 1:][labelled][order]
        scores = logits[:, :-1][labelled][order].float()
        losses = functional.cross_entropy(scores, targets, reduction="none").view(counts, -1).sum(-1)
        weights = torch.tensor(self.weights, device=losses.device)
        total = (weights * losses).sum()
        if self.distillation_weight:
            total = total + self.distillation_weight * self._divergence(scores.view(counts, -1, vocab_size), weights)
        return total / (len(targets) / counts if num_items_in_batch is None else num_items_in_batch)

    def _divergence(self, scores: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        log_probabilities = (scores / self.temperature).log_softmax(-1)
        wanted = log_probabilities[self.teacher].detach().expand_as(scores)
        divergence = functional.kl_div(log_probabilities, wanted, reduction="none", log_target=True).sum((1, 2))
        students = weights.clone()
        students[self.teacher] = 0
        return self.temperature**2 * (students / students.sum() * divergence).sum()
