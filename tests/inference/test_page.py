import copy
import io
import re
import shutil
from urllib.parse import urlsplit

import pytest
from PIL import ExifTags, Image


gr = pytest.importorskip("gradio", reason="the page needs the extra `page`")

from tokenflex.data.synthetic import SyntheticVQA  # noqa: E402
from tokenflex.inference import page  # noqa: E402
from tokenflex.towers.tiny import train_tokenizer  # noqa: E402


QUESTION = "which color is the paper?"


@pytest.fixture(scope="module")
def image():
    return SyntheticVQA(1, 4)[0]["image"]


def png(image):
    stored = io.BytesIO()
    image.save(stored, "PNG")
    return stored.getvalue()


@pytest.fixture
def uploads(tmp_path, monkeypatch):
    """The folder of what visitors upload."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    (tmp_path / "uploads").mkdir()
    return tmp_path / "uploads"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no image that can be read"),
        (b"not an image", "no image that can be read"),
        (png(SyntheticVQA(1, 4)[0]["image"])[:-60], "cannot be decoded"),
        (png(Image.new("1", (12000, 9000))), "108 megapixels; at most 100"),
        (png(Image.new("1", (20000, 10000))), "200000000 pixels"),
    ],
    ids=["empty", "text", "truncated", "large", "bomb"],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_images_are_refused_without_naming_the_servers_files(uploads, content, message):
    (uploads / "secret.png").write_bytes(content)
    with pytest.raises(ValueError, match=f"Choose another image: .*{message}") as refused:
        page.read_upload({"path": str(uploads / "secret.png")})
    assert "secret" not in str(refused.value)


def test_no_image_is_refused():
    with pytest.raises(ValueError, match="Choose an image first"):
        page.read_upload(None)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16", "CMYK"])
def test_images_of_every_mode_are_read(uploads, mode):
    Image.new(mode, (40, 30)).save(uploads / "image.tiff")
    assert page.read_upload({"path": str(uploads / "image.tiff")}).size == (40, 30)


def test_examples_are_offered_as_the_model_sees_them(tiny, monkeypatch, tmp_path):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    upright = Image.effect_noise((40, 30), 60).convert("RGB")
    stored, exif = upright.transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    stored.save(tmp_path / "photo.png", exif=exif)
    with Image.open(tmp_path / "photo.png") as photo:
        built = page.build_page(*tiny, examples=[(photo, "what?"), (upright, "what?"), (photo.convert("CMYK"), "?")])
    [dataset] = [block for block in built.blocks.values() if isinstance(block, gr.Dataset)]
    first, second, third = (page.read_upload(file) for file, _ in dataset.samples)
    assert first.tobytes() == second.tobytes() == upright.tobytes() and third.size == (40, 30)


def test_counts_stand_side_by_side_once_each():
    assert page.counts_to_show(25, [36, 4, 16]) == {4: ["smallest trained"], 25: ["chosen"], 36: ["largest trained"]}
    assert page.counts_to_show(64, [4, 36]) == {4: ["smallest trained"], 36: ["largest trained"], 64: ["chosen"]}
    assert page.counts_to_show(16, [16]) == {16: ["chosen", "smallest trained", "largest trained"]}


def test_synthetic_examples_are_for_models_that_know_their_words(tiny):
    processor = copy.deepcopy(tiny[1])
    examples = page.synthetic_examples(processor)
    assert len(examples) == len(page.EXAMPLE_FAMILIES)
    assert all(isinstance(image, Image.Image) and question.endswith("?") for image, question in examples)
    processor.tokenizer = train_tokenizer(["is there a teal rectangle?"] * 9)
    assert page.synthetic_examples(processor) == []


def test_examples_of_a_folder_are_its_images(tmp_path, image):
    for name in ("b.png", "a.jpg", "notes.txt"):
        (image.save if name != "notes.txt" else lambda path: path.write_text("no image"))(tmp_path / name)
    assert [path for path, _ in page.read_examples(tmp_path)] == [str(tmp_path / "a.jpg"), str(tmp_path / "b.png")]


@pytest.mark.parametrize("folder", ["empty", "missing"])
def test_folder_without_images_is_refused_before_anything_is_loaded(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=f"`examples`=.*{folder}"):
        page.main(["--model_name_or_path", "no/such/checkpoint", "--examples", str(tmp_path / folder)])


def test_auto_is_offered_by_models_that_can_choose(tiny, calibrated):
    for pair, offers in ((tiny, False), (calibrated, True)):
        built = page.build_page(*pair, examples=[])
        assert any(isinstance(block, gr.Checkbox) for block in built.blocks.values()) == offers


def responder(pair):
    built = page.build_page(*pair, examples=[])
    [respond] = [function for function in built.fns.values() if function.name == "respond"]
    return built, respond


def test_one_question_is_answered_at_a_time_and_nothing_is_reported(tiny):
    built, respond = responder(tiny)
    assert respond.concurrency_limit == 1 and respond.queue is not False
    assert not built.analytics_enabled


def test_one_press_shows_count_by_count_from_one_run_of_the_tower(tiny, image, uploads):
    image.save(uploads / "image.png")
    runs = []
    hook = tiny[0].model.vision_tower.register_forward_hook(lambda *_: runs.append(1))
    shown = list(responder(tiny)[1].fn({"path": str(uploads / "image.png")}, QUESTION, 5))
    hook.remove()
    assert [re.findall('data-tokens="(.*?)"', each) for each in shown] == [["4"], ["4", "25"], ["4", "25", "36"]]
    assert len(runs) == 1


@pytest.mark.parametrize(
    ("question", "side", "message"), [("", 4, "Type"), (QUESTION, 9, "from .*1, 1"), (QUESTION, 0, "from .*1, 1")]
)
def test_bad_input_becomes_a_message_on_the_page(tiny, image, uploads, question, side, message):
    image.save(uploads / "image.png")
    with pytest.raises(gr.Error) as refused:
        list(responder(tiny)[1].fn({"path": str(uploads / "image.png")}, question, side))
    assert re.search(message, refused.value.message)


def test_the_machines_other_files_are_not_shown(tiny, image, uploads, tmp_path):
    """A request made by hand may name any path."""
    image.save(tmp_path / "private.png")
    for path in (tmp_path / "private.png", uploads / ".." / "private.png"):
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
def address(calibrated):
    built = page.build_page(*calibrated)
    _, address, _ = built.launch(prevent_thread_lock=True, quiet=True, ssr_mode=False, server_name="127.0.0.1")
    yield address
    built.close()


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
        tokens = "[...document.querySelectorAll('.flex-card')].map(card => card.dataset.tokens)"
        page.wait_for_function(f"{tokens} == '{','.join(map(str, expected))}'")
        return page.locator(".flex-card dl").all_inner_texts()

    button.click()
    page.get_by_text("Choose an image first").wait_for()

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
    page.get_by_text("no image that can be read").wait_for()

    upload("good.png")
    page.locator("#auto input").check()
    side.locator("input[type=range]:disabled").wait_for()
    button.click()
    page.get_by_text("auto chose it").wait_for()
    assert errors == []
    assert {urlsplit(url).hostname for url in requests if not url.startswith("data:")} <= {"127.0.0.1"}
