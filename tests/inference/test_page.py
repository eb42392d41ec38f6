import copy
import io
import re
import shutil
from types import SimpleNamespace
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image


gr = pytest.importorskip("gradio", reason="the page needs the extra `demo`")

from tokenflex.data.synthetic import SyntheticVQA  # noqa: E402
from tokenflex.inference import page as demo  # noqa: E402
from tokenflex.towers.tiny import train_tokenizer  # noqa: E402


QUESTION = "which color is the paper?"


@pytest.fixture(scope="module")
def image():
    return SyntheticVQA(1, 4)[0]["image"]


@pytest.fixture(scope="module")
def choosing(tiny):
    """The tiny model with a chooser, which does not depend on what it learned."""
    model = copy.deepcopy(tiny[0])
    choices = model.config.vision_token_choices
    weight = np.random.default_rng(0).normal(size=(len(choices), model.config.text_config.hidden_size)).tolist()
    model.config.vision_token_chooser = {"choices": choices, "weight": weight, "bias": [0.0] * 3, "tolerance": 0.1}
    return model, tiny[1]


def encode(processor, image, question=QUESTION, **options):
    content = [{"type": "image"}, {"type": "text", "text": question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return processor(images=image, text=prompt, return_tensors="pt", **options)


@pytest.mark.parametrize("count", [1, 4, 16, 25, 64])
def test_answer_is_the_one_that_generate_gives_at_that_count(tiny, image, count):
    model, processor = tiny
    inputs = encode(processor, image, num_vision_tokens=count)
    output = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    answer = demo.answer_at(model, processor, demo.ask(model, processor, image, QUESTION), count, max_new_tokens=6)
    assert answer.text == processor.decode(output, skip_special_tokens=True).strip()
    assert answer.prompt_tokens == inputs["input_ids"].shape[1]
    assert answer.grid == (count**0.5, count**0.5)


def test_first_token_is_timed_before_the_last(tiny, image, monkeypatch):
    model, processor = tiny
    ticks = iter(range(1000))
    asked = demo.ask(model, processor, image, QUESTION)
    monkeypatch.setattr(demo, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    for length in (1, 2, 6):
        answer = demo.answer_at(model, processor, asked, 4, max_new_tokens=length)
        assert answer.milliseconds_to_first_token == 1000  # one tick: the clock is read at the start and at that token


def test_tower_runs_once_for_all_counts(choosing, image):
    model, processor = choosing
    runs = []
    hook = model.model.vision_tower.register_forward_hook(lambda *_: runs.append(1))
    asked = demo.ask(model, processor, image, QUESTION)
    demo.choose_count(model, asked)
    for count in (4, 16, 36):
        demo.answer_at(model, processor, asked, count, max_new_tokens=2)
    hook.remove()
    assert len(runs) == 1


def test_chosen_count_is_the_one_that_auto_gives(choosing, image):
    model, processor = choosing
    chosen = []
    for question in (QUESTION, "how many red dots are there?", "what is it?", "3"):
        inputs = encode(processor, image, question)
        output = model.generate(**inputs, num_vision_tokens="auto", max_new_tokens=1, return_dict_in_generate=True)
        count, _ = demo.choose_count(model, demo.ask(model, processor, image, question))
        assert count == output.num_vision_tokens.item()
        chosen.append(count)
    assert len(set(chosen)) > 1


def test_choosing_without_a_chooser_is_refused(tiny, image):
    with pytest.raises(ValueError, match="tokenflex calibrate"):
        demo.choose_count(tiny[0], demo.ask(*tiny, image, QUESTION))


def test_grid_follows_the_images_shape_where_the_processor_does(tiny, monkeypatch):
    model, processor = tiny
    monkeypatch.setattr(processor, "match_aspect_ratio", True)
    asked = demo.ask(model, processor, Image.new("RGB", (200, 100), "red"), QUESTION)
    answer, other = (demo.answer_at(model, processor, asked, count, max_new_tokens=1) for count in (16, 4))
    assert answer.grid[1] > answer.grid[0]
    difference = answer.prompt_tokens - other.prompt_tokens
    assert difference == answer.grid[0] * answer.grid[1] - other.grid[0] * other.grid[1]


@pytest.mark.parametrize("size", [(64, 64), (640, 480), (300, 2000)])
@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (3, 6), (6, 6)])
def test_drawn_grid_has_its_rows_and_columns(size, grid):
    color = (200, 30, 90)
    drawn = np.asarray(demo.draw_grid(Image.new("RGB", size, color), grid))
    paper = (drawn == color).all(-1)

    def runs(line):
        return int((np.diff(line.astype(int), prepend=0) == 1).sum())

    assert (runs(paper.any(1)), runs(paper.any(0))) == grid


def test_strip_narrower_than_a_line_is_drawn():
    assert demo.draw_grid(Image.new("RGB", (3, 3000)), (6, 6)).size == (1, 360)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16", "CMYK"])
def test_images_of_every_mode_are_answered_and_drawn(tiny, mode, tmp_path):
    Image.new(mode, (40, 30)).save(tmp_path / "image.tiff")
    image = demo.read_image(tmp_path / "image.tiff")
    answer = demo.answer_at(*tiny, demo.ask(*tiny, image, QUESTION), 4, max_new_tokens=1)
    assert 'data-tokens="4"' in demo.render_card(image, answer, ["your choice"])


def png(image):
    stored = io.BytesIO()
    image.save(stored, "PNG")
    return stored.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "Choose an image"),
        (b"", "not an image"),
        (b"not an image", "not an image"),
        (png(SyntheticVQA(1, 4)[0]["image"])[:-60], "damaged"),
        (png(Image.new("1", (12000, 9000))), "more than 100 megapixels"),
        (png(Image.new("1", (20000, 10000))), "more than 100 megapixels"),
    ],
    ids=["none", "empty", "text", "truncated", "large", "bomb"],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_images_are_refused_without_naming_the_servers_files(tmp_path, content, message):
    path = None if content is None else tmp_path / "secret.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as refused:
        demo.read_image(path)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(("question", "message"), [("", "Type"), (" \n", "Type"), ("a" * 1001, "1001 characters")])
def test_bad_questions_are_refused(tiny, image, question, message):
    with pytest.raises(ValueError, match=message):
        demo.ask(*tiny, image, question)


def test_impossible_counts_are_refused(tiny, image):
    with pytest.raises(ValueError, match="num_vision_tokens.*5.*Nearest"):
        demo.answer_at(*tiny, demo.ask(*tiny, image, QUESTION), 5)


def test_counts_stand_side_by_side_once_each():
    assert demo.counts_to_show(25, [36, 4, 16]) == {4: ["smallest trained"], 25: ["chosen"], 36: ["largest trained"]}
    assert demo.counts_to_show(64, [4, 36]) == {4: ["smallest trained"], 36: ["largest trained"], 64: ["chosen"]}
    assert demo.counts_to_show(16, [16]) == {16: ["chosen", "smallest trained", "largest trained"]}


def test_what_the_model_says_is_text_not_markup(image):
    shown = demo.render_card(image, demo.Answer("<script>alert(1)</script>", (1, 1), 9, 1.0), ["your choice"])
    assert "<script" not in shown and "&lt;script&gt;" in shown
    assert "<b>" not in demo.render_answers("<b>", [], 1.0)


def test_synthetic_examples_are_for_models_that_know_their_words(tiny, monkeypatch):
    examples = demo.synthetic_examples(tiny[1])
    assert len(examples) == len(demo.EXAMPLE_FAMILIES)
    assert all(isinstance(image, Image.Image) and question.endswith("?") for image, question in examples)
    monkeypatch.setattr(tiny[1], "tokenizer", train_tokenizer(["is there a teal rectangle?"] * 9))
    assert demo.synthetic_examples(tiny[1]) == []


def test_examples_of_a_folder_are_its_images(tmp_path, image):
    for name in ("b.png", "a.jpg", "notes.txt"):
        (image.save if name != "notes.txt" else lambda path: path.write_text("no image"))(tmp_path / name)
    assert [path for path, _ in demo.read_examples(tmp_path)] == [str(tmp_path / "a.jpg"), str(tmp_path / "b.png")]


@pytest.mark.parametrize("folder", ["empty", "missing"])
def test_folder_without_images_is_refused_before_anything_is_loaded(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=f"`examples`=.*{folder}"):
        demo.main(["--model_name_or_path", "no/such/checkpoint", "--examples", str(tmp_path / folder)])


def test_auto_is_offered_by_models_that_can_choose(tiny, choosing):
    for pair, offers in ((tiny, False), (choosing, True)):
        page = demo.build_demo(*pair, examples=[])
        assert any(isinstance(block, gr.Checkbox) for block in page.blocks.values()) == offers


def responder(pair):
    page = demo.build_demo(*pair, examples=[])
    [respond] = [function for function in page.fns.values() if function.name == "respond"]
    return page, respond


def test_one_question_is_answered_at_a_time_and_nothing_is_reported(tiny):
    page, respond = responder(tiny)
    assert respond.concurrency_limit == 1 and respond.queue is not False
    assert not page.analytics_enabled


def test_one_press_shows_count_by_count_from_one_run_of_the_tower(tiny, image, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    image.save(tmp_path / "image.png")
    runs = []
    hook = tiny[0].model.vision_tower.register_forward_hook(lambda *_: runs.append(1))
    shown = list(responder(tiny)[1].fn({"path": str(tmp_path / "image.png")}, QUESTION, 5))
    hook.remove()
    assert [re.findall('data-tokens="(.*?)"', each) for each in shown] == [["4"], ["4", "25"], ["4", "25", "36"]]
    assert len(runs) == 1


@pytest.mark.parametrize(
    ("question", "side", "message"), [("", 4, "Type"), (QUESTION, 9, "from .*1, 1"), (QUESTION, 0, "from .*1, 1")]
)
def test_bad_input_becomes_a_message_on_the_page(tiny, image, tmp_path, monkeypatch, question, side, message):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    image.save(tmp_path / "image.png")
    with pytest.raises(gr.Error) as refused:
        list(responder(tiny)[1].fn({"path": str(tmp_path / "image.png")}, question, side))
    assert re.search(message, refused.value.message)


def test_the_machines_other_files_are_not_shown(tiny, image, tmp_path, monkeypatch):
    """A request made by hand may name any path."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    image.save(tmp_path / "private.png")
    for path in (tmp_path / "private.png", tmp_path / "uploads" / ".." / "private.png"):
        with pytest.raises(gr.Error) as refused:
            list(responder(tiny)[1].fn({"path": str(path)}, QUESTION, 4))
        assert "Choose an image first" in refused.value.message


@pytest.fixture
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="driving a browser needs playwright")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium on this machine")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def address(choosing):
    page = demo.build_demo(*choosing)
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True, ssr_mode=False, server_name="127.0.0.1")
    yield address
    page.close()


def test_page_answers_in_a_browser_and_outlives_bad_uploads(browser, address, image, tmp_path):
    image.save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"not an image")
    page = browser.new_page()
    page.set_default_timeout(30_000)
    requests, errors = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: errors.append(error))
    page.goto(address)
    button, side = page.locator("#answer"), page.locator("#side")

    def upload(name):
        if page.get_by_label("Remove Image").count():
            page.get_by_label("Remove Image").click()
        with page.expect_response(re.compile("/upload")):
            page.locator("#image input[type=file]").set_input_files(tmp_path / name)
        page.get_by_label("Remove Image").wait_for()

    def tokens_shown(*expected):
        wanted = f"[...document.querySelectorAll('.flex-card')].map(card => card.dataset.tokens) == '{','.join(map(str, expected))}'"
        page.wait_for_function(wanted)
        return page.locator(".flex-card dl").all_inner_texts()

    button.click()
    page.get_by_text("Choose an image first.").wait_for()

    upload("good.png")
    button.click()
    page.get_by_text("Type a question about the image.").wait_for()

    question = "is ${1 + 1} {{two}} <b>bold</b>?"
    page.locator("#question textarea").fill(question)
    button.click()
    figures = tokens_shown(4, 16, 36)
    assert page.locator(".flex-question").inner_text() == question
    assert page.locator(".flex-card.chosen").get_attribute("data-tokens") == "16"

    side.locator("input[type=range]").press("ArrowRight")
    side.get_by_text("5 × 5 = 25").wait_for()
    button.click()
    changed = tokens_shown(4, 25, 36)
    assert "5 × 5" in changed[1] and changed[1] != figures[1]

    upload("bad.png")
    button.click()
    page.get_by_text("The file is not an image that can be read.").wait_for()

    upload("good.png")
    page.locator("#auto input").check()
    side.locator("input[type=range]:disabled").wait_for()
    button.click()
    page.get_by_text("auto chose it").wait_for()
    assert errors == []
    assert {urlsplit(url).hostname for url in requests if not url.startswith("data:")} <= {"127.0.0.1"}
