import dataclasses

import pytest

from tokenflex.training.arguments import RECIPES, TokenFlexTrainingArguments, find_recipe, read_recipe
from tokenflex.training.train import make_parser


FIELDS = make_parser().fields
SHIPPED = sorted(RECIPES.rglob("*.yaml"))


def parse(*argv):
    return make_parser().parse_args_into_dataclasses(
        ["--model_name_or_path", "m", *argv, "--output_dir", "o"], look_for_args_file=False
    )


def write(path, text):
    path.write_text(text)
    return path


def test_the_command_line_goes_before_the_recipe(tmp_path):
    recipe = write(
        tmp_path / "r.yaml",
        "learning_rate: 1e-3\nfreeze: [vision_tower, language_model]\npacking: true\nmax_steps: 7\nwarmup_steps:\n"
        "lr_scheduler_kwargs: {num_decay_steps: 3}\n",
    )
    argv = read_recipe(recipe, FIELDS)
    model_args, _, _, args = parse("--dataset", "d", *argv)[:4]
    assert (args.learning_rate, args.packing, args.max_steps, args.warmup_steps) == (1e-3, True, 7, 0)
    assert args.lr_scheduler_kwargs == {"num_decay_steps": 3}
    assert model_args.freeze == ["vision_tower", "language_model"]
    overridden = ("--learning_rate", "1e-5", "--packing", "false", "--freeze", "none")
    model_args, _, _, args = parse("--dataset", "d", *argv, *overridden)[:4]
    assert (args.learning_rate, args.packing, args.max_steps) == (1e-5, False, 7)
    assert model_args.freeze == ["none"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1e-3", r"r\.yaml: there is no field `learning_rat`\. Did you mean `learning_rate`\?"),
        ("optim: [adamw_torch, sgd]", r"r\.yaml: `optim` takes one value, not \['adamw_torch', 'sgd'\]"),
        ("xyzzy: 1", r"there is no field `xyzzy`\. `tokenflex train --help`"),
        ("- a\n- b", "has to hold `field: value` lines, but holds list"),
        ("a: [1", r"r\.yaml is no YAML"),
        ("", "holds NoneType"),
    ],
)
def test_a_recipe_with_a_slip_is_refused_by_name(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_recipe(write(tmp_path / "r.yaml", text), FIELDS)


def test_a_missing_recipe_names_those_that_are_there(tmp_path):
    with pytest.raises(ValueError, match=r"no such file.*full/stage1\.yaml, .*small/stage2\.yaml"):
        read_recipe(find_recipe("full/stage9.yaml"), FIELDS)


def test_recipes_of_the_package_are_found_by_name_and_ones_own_go_before_them(tmp_path, monkeypatch):
    assert find_recipe("small/stage2.yaml") == RECIPES / "small/stage2.yaml"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small").mkdir()
    write(tmp_path / "small" / "stage2.yaml", "seed: 1")
    assert find_recipe("small/stage2.yaml").absolute() == tmp_path / "small" / "stage2.yaml"


@pytest.mark.parametrize("recipe", SHIPPED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_shipped_recipes_hold_fields_that_exist(recipe):
    _, data_args, _, args = parse(
        *read_recipe(recipe, FIELDS), "--bf16", "false", *([] if "small" in str(recipe) else ["--dataset", "d"])
    )[:4]
    assert args.learning_rate < 1e-2 and data_args.dataset


def test_every_field_of_this_project_is_explained(capsys):
    help_text = make_parser().format_help()
    for cls in (TokenFlexTrainingArguments, *[type(part) for part in parse("--dataset", "d")[:3]]):
        own = [
            field
            for field in dataclasses.fields(cls)
            if cls is not TokenFlexTrainingArguments or field.name in vars(cls)
        ]
        for field in own:
            assert f"--{field.name}" in help_text and len(field.metadata.get("help", "x" * 20)) > 15, field.name


def test_muon_and_rates_of_parts_exclude_each_other(tmp_path):
    with pytest.raises(ValueError, match="`muon`=True has one learning rate"):
        TokenFlexTrainingArguments(str(tmp_path), muon=True, projector_learning_rate=1e-3)


def test_the_best_checkpoint_is_that_of_the_best_mean_accuracy(tmp_path):
    args = TokenFlexTrainingArguments(
        str(tmp_path), load_best_model_at_end=True, eval_strategy="steps", save_strategy="steps", eval_steps=500
    )
    assert (args.metric_for_best_model, args.greater_is_better) == ("accuracy", True)


def test_values_that_yaml_or_the_command_line_would_mistake(tmp_path):
    recipe = write(
        tmp_path / "r.yaml", "save_strategy: no\neval_strategy: no\nlora_alpha: -1.0e-5\nrun_name: two words\n"
    )
    model_args, _, _, args = parse("--dataset", "d", *read_recipe(recipe, FIELDS))[:4]
    assert (args.save_strategy, args.eval_strategy, args.run_name) == ("no", "no", "two words")
    assert model_args.lora_alpha == -1e-5


def test_half_of_an_options_name_is_no_option():
    with pytest.raises(ValueError, match="--learning_rat"):
        parse("--dataset", "d", "--learning_rat", "1")
