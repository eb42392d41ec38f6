import pytest
from transformers import AutoModelForImageTextToText

from tokenflex.research import resolutions


SIZE = {"scale": 0.001, "num_images": 6}


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resolutions")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resolutions, "BATCH_SIZE", 2)
        yield resolutions.run_seed(0, folder, **SIZE), folder


def test_every_choice_of_every_arm_is_tested_and_priced(result):
    tested, folder = result
    names = [f"{arm} {choice}" for arm, weights in resolutions.ARMS.items() for choice in weights]
    for figures in ("right", "flops", "milliseconds"):
        assert set(tested[figures]) == set(names)
    assert {len(rates) for rates in tested["right"].values()} == {len(tested["families"])} == {len(tested["images"])}
    assert tested["flops"]["pairs 36"] == tested["flops"]["counts 36"] > tested["flops"]["pairs 16@48"]
    assert resolutions.run_seed(0, folder, **SIZE) == tested, "what is done is used again"


def test_arms_are_trained_and_saved_at_their_choices(result):
    for arm, weights in resolutions.ARMS.items():
        config = AutoModelForImageTextToText.from_pretrained(result[1] / "0" / arm / "final").config
        assert config.vision_token_choices == list(weights)
        assert config.vision_token_weights == list(weights.values())


def test_the_table_holds_every_choice_and_for_each_count_a_pair_that_computes_no_more(result):
    tested = result[0]
    lines = resolutions.table([tested, tested]).splitlines()
    first, second = (i for i, line in enumerate(lines) if line.startswith("|--"))
    assert [line.split("|")[2].strip() for line in lines[first + 1 : first + 1 + len(tested["right"])]] == [
        name.split()[1] for name in tested["right"]
    ]
    for line in lines[second + 1 : second + 1 + len(resolutions.ARMS["counts"])]:
        count, pair = (cell.strip() for cell in line.split("|")[1:3])
        assert tested["flops"][f"pairs {pair}"] <= tested["flops"][f"counts {count}"]
