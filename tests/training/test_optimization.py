import copy

import pytest
import torch
from torch import nn

from tokenflex.towers.tiny import tiny_model_and_processor
from tokenflex.training.optimization import MuonAdamW, orthogonalize


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.convolution = nn.Conv1d(4, 4, 3, padding=1)
        self.hidden = nn.Linear(4, 6)
        self.norm = nn.LayerNorm(6)
        self.lm_head = nn.Linear(6, 7, bias=False)

    def forward(self, ids):
        features = self.convolution(self.embedding(ids).transpose(1, 2)).transpose(1, 2)
        return self.lm_head(self.norm(self.hidden(features).relu()))


def fresh():
    torch.manual_seed(0)
    return Small()


def set_gradients(model, step):
    torch.manual_seed(100 + step)
    model.zero_grad()
    ids = torch.randint(0, 7, (3, 5))
    nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()


def take_steps(model, optimizer, steps, scheduler=None):
    for step in steps:
        set_gradients(model, step)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def assert_equal_weights(first, second):
    other = dict(second.named_parameters())
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, other[name]), name


@pytest.mark.parametrize("frozen", [(), ("vision_tower",), ("language_model",), ("vision_tower", "language_model")])
def test_every_trainable_parameter_is_covered_once(frozen):
    model, _ = tiny_model_and_processor(width=32)
    for part in frozen:
        getattr(model.model, part).requires_grad_(False)
    optimizer = MuonAdamW(model, lr=1e-3)
    trainable = sorted(id(parameter) for parameter in model.parameters() if parameter.requires_grad)
    assert sorted(id(p) for group in optimizer.param_groups for p in group["params"]) == trainable
    assert sorted(id(p) for part in optimizer.parts for group in part.param_groups for p in group["params"]) == (
        trainable
    )


def test_hidden_matrices_alone_go_to_muon():
    model = fresh()
    in_muon = {
        id(p) for part in MuonAdamW(model, lr=1e-3).parts if isinstance(part, torch.optim.Muon)
        for group in part.param_groups for p in group["params"]
    }  # fmt: skip
    assert in_muon == {id(model.hidden.weight)}


def test_norms_and_biases_have_no_decay():
    model = fresh()
    for group in MuonAdamW(model, lr=1e-3, weight_decay=0.1).param_groups:
        assert all((group["weight_decay"] == 0) == (parameter.ndim < 2) for parameter in group["params"])


def test_steps_equal_muon_and_adamw_applied_separately():
    model, separate = fresh(), fresh()
    muon = torch.optim.Muon([separate.hidden.weight], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    matrices = [separate.embedding.weight, separate.convolution.weight, separate.lm_head.weight]
    plain = [parameter for parameter in separate.parameters() if parameter.ndim == 1]
    adamw = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], lr=0.01, betas=(0.9, 0.98)
    )
    optimizer = MuonAdamW(model, lr=0.01, weight_decay=0.1)
    for step in range(3):
        set_gradients(model, step)
        optimizer.step()
        set_gradients(separate, step)
        muon.step()
        adamw.step()
    start = fresh().hidden.weight
    moved, expected = model.hidden.weight - start, separate.hidden.weight - start
    torch.testing.assert_close(moved, expected, rtol=0, atol=0.02 * expected.abs().max().item())  # torch's in bfloat16
    with torch.no_grad():
        model.hidden.weight.copy_(separate.hidden.weight)
    torch.testing.assert_close(dict(model.named_parameters()), dict(separate.named_parameters()), rtol=0, atol=2e-4)


@pytest.mark.parametrize("shape", [(5, 5), (3, 40), (40, 3)])
def test_orthogonalized_matrices_have_singular_values_near_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    muon = torch.optim.Muon([nn.Parameter(matrix)]).defaults
    near = orthogonalize(1e-3 * matrix, muon["ns_coefficients"], muon["ns_steps"], muon["eps"])
    assert near.shape == shape and near.dtype == torch.float32
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    singular = left.T @ near @ right.T
    torch.testing.assert_close(singular, torch.diag(singular.diag()), rtol=0, atol=1e-5)
    assert ((singular.diag() - 1).abs() < 0.5).all()


def test_one_step_changes_every_trained_parameter():
    model, before = fresh(), fresh()
    take_steps(model, MuonAdamW(model, lr=0.01), range(1))
    unchanged = dict(before.named_parameters())
    assert not any(torch.equal(parameter, unchanged[name]) for name, parameter in model.named_parameters())


def test_scheduler_reaches_the_parts():
    model, before = fresh(), fresh()
    optimizer = MuonAdamW(model, lr=0.01)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    assert {group["lr"] for part in optimizer.parts for group in part.param_groups} == {0.0}
    take_steps(model, optimizer, range(2))
    assert_equal_weights(model, before)


@pytest.mark.parametrize("through_file", [False, True])
def test_resumed_equals_uninterrupted(tmp_path, through_file):
    def schedule(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    uninterrupted = fresh()
    optimizer = MuonAdamW(uninterrupted, lr=0.01)
    take_steps(uninterrupted, optimizer, range(6), schedule(optimizer))

    first = fresh()
    optimizer = MuonAdamW(first, lr=0.01)
    scheduler = schedule(optimizer)
    take_steps(first, optimizer, range(3), scheduler)
    saved = copy.deepcopy((first.state_dict(), optimizer.state_dict(), scheduler.state_dict()))
    if through_file:
        torch.save(saved, tmp_path / "state.pt")
        saved = torch.load(tmp_path / "state.pt", weights_only=True)

    resumed = Small()
    optimizer = MuonAdamW(resumed, lr=0.01)
    scheduler = schedule(optimizer)
    resumed.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    scheduler.load_state_dict(saved[2])
    take_steps(resumed, optimizer, range(3, 6), scheduler)
    assert_equal_weights(resumed, uninterrupted)


def test_closure_is_called_with_gradients_and_its_loss_returned():
    model = fresh()
    optimizer = MuonAdamW(model, lr=0.01)

    def closure():
        model.zero_grad()
        loss = model(torch.tensor([[1, 2, 3]])).square().mean()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first
