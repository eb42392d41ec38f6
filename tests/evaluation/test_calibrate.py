import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from tokenflex.checkpoints.files import save_checkpoint
from tokenflex.data.synthetic import SyntheticVQA
from tokenflex.evaluation.calibrate import Observations, calibrate, fit_head, foresee, main, observe, trace
from tokenflex.evaluation.sweep import predict, score
from tokenflex.towers.tiny import tiny_model_and_processor


def made_up(num_questions=2000, hidden_size=12, seed=0):
    """Half of the questions need many tokens, which one direction of the hidden states tells."""
    generator = torch.Generator().manual_seed(seed)
    hidden_states = torch.randn(num_questions, hidden_size, generator=generator)
    needs_many = hidden_states[:, 3] > 0
    chances = torch.where(needs_many[:, None], torch.tensor([0.1, 0.5, 0.95]), torch.tensor([0.95, 0.95, 0.95]))
    right = (torch.rand(num_questions, 3, generator=generator) < chances).float()
    return Observations([4, 16, 36], hidden_states, right, torch.arange(num_questions) // 3), needs_many


@pytest.fixture
def model():
    return tiny_model_and_processor(width=12 * 4)[0]


def calibrated(observations, **target):
    model = tiny_model_and_processor(width=32)[0]
    padded = torch.cat([observations.hidden_states, torch.zeros(len(observations.right), 20)], dim=-1)
    padded[:, 12:] = 0.01 * torch.randn(padded[:, 12:].shape, generator=torch.Generator().manual_seed(1))
    observations = Observations(observations.choices, padded, observations.right, observations.images)
    return calibrate(model, observations, **target), model


def test_fitted_chances_are_those_of_a_reference():
    linear_model = pytest.importorskip("sklearn.linear_model")
    observations, _ = made_up(600)
    penalty = 1e-2
    weight, bias = fit_head(observations.hidden_states, observations.right, penalty)
    mean, scale = observations.hidden_states.mean(0), observations.hidden_states.std(0)
    features = ((observations.hidden_states - mean) / scale).numpy()
    ours = (observations.hidden_states @ weight.T + bias).sigmoid()
    for column in range(3):
        # Its penalty is half the squared norm beside the sum over questions; ours is beside the mean over all choices.
        reference = linear_model.LogisticRegression(C=1 / (2 * penalty * 3 * 600), tol=1e-8, max_iter=1000)
        reference.fit(features, observations.right[:, column].numpy())
        theirs = torch.tensor(reference.predict_proba(features)[:, 1], dtype=torch.float)
        torch.testing.assert_close(ours[:, column], theirs, atol=2e-3, rtol=0)


def test_a_lossless_choice_is_found_where_the_hidden_states_tell():
    observations, needs_many = made_up()
    report, model = calibrated(observations, accuracy_loss=0.01)
    assert report["point"]["accuracy"] >= report["uniform"][36] - 0.01
    assert report["point"]["vision_tokens"] < 24
    fresh, fresh_needs = made_up(seed=7)
    padded = torch.cat([fresh.hidden_states, torch.zeros(len(fresh.right), 20)], dim=-1)
    chances = model.model.vision_token_chooser(padded)
    point = trace(chances, fresh, [1, 2, 3], [model.config.vision_token_chooser["tolerance"]])[0]
    assert point.accuracy == pytest.approx(report["point"]["accuracy"], abs=0.03)
    assert point.vision_tokens == pytest.approx(report["point"]["vision_tokens"], abs=2)


def test_a_budget_of_tokens_is_kept():
    observations, _ = made_up()
    for budget in (10, 20, 30):
        report, _ = calibrated(observations, mean_tokens=budget)
        assert report["point"]["vision_tokens"] <= budget
    with pytest.raises(ValueError, match="`mean_tokens`=3: the least that is read is 4.0"):
        calibrated(observations, mean_tokens=3)


def test_noise_foresees_nothing_and_no_image_is_in_its_own_fold():
    observations, _ = made_up(900)
    states = torch.randn(900, 12, generator=torch.Generator().manual_seed(1))
    noise = Observations(observations.choices, states, observations.right, observations.images)
    chances, penalty = foresee(noise)
    loss = torch.nn.functional.binary_cross_entropy(chances, noise.right)
    rates = noise.right.mean(0).expand_as(noise.right)
    assert loss > torch.nn.functional.binary_cross_entropy(rates, noise.right) - 1e-3
    copies = Observations(noise.choices, noise.hidden_states[::3].repeat_interleave(3, 0), noise.right, noise.images)
    chances, _ = foresee(copies)
    assert torch.equal(chances[::3], chances[1::3]), "questions about one image are in one fold"


def test_observed_answers_are_those_of_an_evaluation(tiny):
    model, processor = tiny
    rows = SyntheticVQA(6, 4, questions_per_image=3)
    observations = observe(model, processor, rows, batch_size=4, show_progress=False)
    overall = score(predict(model, processor, rows, [4, 16, 36], show_progress=False), [4, 16, 36])["overall"]
    assert observations.right.mean(0).tolist() == pytest.approx(list(overall.values()))
    other = observe(model, processor, rows, batch_size=64, show_progress=False)
    torch.testing.assert_close(other.hidden_states, observations.hidden_states, atol=1e-4, rtol=1e-4)
    assert torch.equal(other.images, observations.images)


def test_the_command_teaches_a_folder_in_place_or_beside_it(tiny, tmp_path, capsys):
    save_checkpoint(tmp_path / "checkpoint", *tiny)
    weights = load_file(tmp_path / "checkpoint" / "model.safetensors")
    (tmp_path / "checkpoint" / "README.md").write_text("A card.")
    arguments = [
        "--model_name_or_path",
        str(tmp_path / "checkpoint"),
        "--dataset",
        "synthetic:8@3",
        "--accuracy_loss",
        "1",
    ]
    main(arguments)
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["questions"] == sum(len(row["questions"]) for row in SyntheticVQA(8, 3))
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "checkpoint")
    assert model.config.vision_token_chooser["choices"] == [4, 16, 36]
    assert (tmp_path / "checkpoint" / "README.md").read_text() == "A card."
    taught = load_file(tmp_path / "checkpoint" / "model.safetensors")
    assert {name for name in taught if name not in weights} == {
        "model.vision_token_chooser.weight", "model.vision_token_chooser.bias"
    }  # fmt: skip
    assert all(torch.equal(taught[name], weight) for name, weight in weights.items())
    main([*arguments, "--output_dir", str(tmp_path / "beside")])
    beside = AutoModelForImageTextToText.from_pretrained(tmp_path / "beside")
    assert beside.config.vision_token_chooser == model.config.vision_token_chooser
    assert torch.equal(beside.model.vision_token_chooser.weight, model.model.vision_token_chooser.weight)
    assert len(json.loads((tmp_path / "beside" / "calibration.json").read_text())["curve"]) == 201
