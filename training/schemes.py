"""The counts that a step trains at: one that is drawn, one per sample, or all of them at once, with their loss."""

from collections.abc import Sequence

import torch
from torch.nn import functional


SCHEMES = {
    "batch": "one count drawn for each micro-batch (paper)",
    "sample": "one count drawn for each sample",
    "nested": "every count in every step, behind one pass of the vision tower; losses averaged by weight",
    "distill": "as nested, and the answers at smaller counts follow the distribution at the largest",
}
NESTED = ("nested", "distill")


def nested_loss(
    logits: torch.Tensor,
    labels: torch.LongTensor,
    rows: torch.LongTensor,
    weights: Sequence[float],
    num_items_in_batch: int | torch.Tensor | None = None,
    teacher: int = -1,
    distillation_weight: float = 0.0,
    temperature: float = 1.0,
    base_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Computes the loss of a batch that holds every sample at several counts: the mean of the counts' losses by weight,
    and with distillation the divergence of each smaller count's answers from the largest count's.

    Args:
        logits (`torch.Tensor` of shape `(batch_size, sequence_length, vocab_size)`): The model's.
        labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`): Not yet shifted.
        rows (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
            The row of every position among the rows of all counts, as [`~TokenFlexDataCollator.arrange`] returns it.
        weights (`Sequence[float]`): One weight per count; they need not sum to one.
        num_items_in_batch (`int` or `torch.Tensor`, *optional*):
            The labeled tokens, each sample counted once, of all micro-batches of the step. Defaults to those here.
        teacher (`int`, *optional*, defaults to -1): The position of the largest count.
        distillation_weight (`float`, *optional*, defaults to 0.0):
            The weight of the divergence beside the loss; 0 turns it off.
        temperature (`float`, *optional*, defaults to 1.0):
            The number that logits are divided by before they are compared; the divergence is scaled by its square, so
            that the size of its gradient stays ([Hinton et al., 2015](https://huggingface.co/papers/1503.02531)).
        base_logits (`torch.Tensor` of shape `(num_labels, vocab_size)`, *optional*):
            A frozen teacher's for every label, at the largest count; then every count follows it, the largest too. By
            default the largest count teaches the smaller ones.

    Example:

    ```python
    >>> import torch
    >>> from tokenflex.training.schemes import nested_loss

    >>> logits, labels = torch.tensor([[[0.0, 0.0], [0, 0]], [[0, 9], [0, 0]]]), torch.tensor([[-100, 1], [-100, 1]])
    >>> round(nested_loss(logits, labels, rows=torch.tensor([[0, 0], [1, 1]]), weights=[1, 3]).item(), 3)
    0.173
    ```
    """
    labeled = labels[:, 1:] != -100
    # Sorted by the row they came from, every count has the same tokens in the same order.
    order = rows[:, 1:][labeled].argsort(stable=True)
    targets = labels[:, 1:][labeled][order]
    scores = logits[:, :-1][labeled][order].float()
    weights = torch.tensor(weights, dtype=torch.float32, device=scores.device)
    weights = weights / weights.sum()
    losses = functional.cross_entropy(scores, targets, reduction="none").view(len(weights), -1).sum(-1)
    total = (weights * losses).sum()
    if distillation_weight:
        log_probabilities = (scores.view(len(weights), -1, scores.shape[-1]) / temperature).log_softmax(-1)
        students = weights.clone()
        if base_logits is None:
            wanted = log_probabilities[teacher].detach()
            students[teacher] = 0
        else:
            wanted = (base_logits[order].float() / temperature).log_softmax(-1).view_as(log_probabilities)
        wanted = wanted.expand_as(log_probabilities)
        divergence = functional.kl_div(log_probabilities, wanted, reduction="none", log_target=True).sum((1, 2))
        total = total + distillation_weight * temperature**2 * (students / students.sum() * divergence).sum()
    return total / (len(targets) / len(weights) if num_items_in_batch is None else num_items_in_batch)
