"""
`tokenflex demo`: a page to ask about an image, with the answers of several vision-token counts side by side.

The same page as a Space is an `app.py` of three lines:

```py
from tokenflex.inference.page import build_demo, load

build_demo(*load("you/your-checkpoint")).launch()
```
"""

import base64
import html
import io
import itertools
import math
import statistics
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.generation.streamers import BaseStreamer

from ..configuration_tokenflex import resolve_vision_token_grid, resolve_vision_token_grids
from ..data.examples import BadRowError, decode_image
from ..data.synthetic import COLORS, draw_scene


try:
    import gradio as gr
except ImportError:
    raise ImportError('`tokenflex demo` needs gradio: `pip install "tokenflex[demo]"`.') from None


MAX_MEGAPIXELS = 100
MAX_QUESTION_LENGTH = 1000
SHOWN_SIDE = 360
EXAMPLE_SEED = 1000  # the test seed, whose images no stage of training draws
EXAMPLE_FAMILIES = ("cell_color", "digit_value", "dot_count", "bar_value", "shape_kind", "tallest_bar")
FOLDER_QUESTION = "What is in the image?"


@dataclass(frozen=True)
class AskedQuestion:
    """
    A question about an image that the vision tower has seen.

    Args:
        inputs (`dict`): What `generate` takes, with the tower's features in place of the pixels.
        sizes (`dict[str, list]`): `image_sizes`, if the processor follows images' shapes.
        tower_milliseconds (`float`): How long the tower took.
    """

    inputs: dict
    sizes: dict[str, list]
    tower_milliseconds: float


@dataclass(frozen=True)
class Answer:
    """
    One count's answer.

    Args:
        text (`str`): The answer.
        grid (`tuple[int, int]`): (rows, columns) of the vision tokens.
        prompt_tokens (`int`): How many tokens the language model read, vision tokens among them.
        milliseconds_to_first_token (`float`):
            From the tower's features to the answer's first token, pooling, projector and prefill: the median of three.
    """

    text: str
    grid: tuple[int, int]
    prompt_tokens: int
    milliseconds_to_first_token: float


class _FirstTokenClock(BaseStreamer):
    """Notes how long the prompt is, which `generate` puts first, and when the first token of the answer is there."""

    prompt_tokens = time = None

    def put(self, value):
        if self.prompt_tokens is None:
            self.prompt_tokens = value.shape[-1]
        elif self.time is None:
            self.time = time.perf_counter()

    def end(self):
        pass


@torch.no_grad()
def ask(model, processor, image: Image.Image, question: str) -> AskedQuestion:
    """
    Runs the vision tower, once for all counts. The image is not cut into tiles.

    Args:
        model ([`TokenFlexForConditionalGeneration`]): The model.
        processor ([`TokenFlexProcessor`]): Its processor.
        image (`PIL.Image.Image`): The image.
        question (`str`): The question.

    Returns:
        [`AskedQuestion`]: For [`answer_at`] and [`choose_count`].

    Raises:
        ValueError: If the question is empty or longer than 1000 characters.
    """
    question = question.strip()
    if not question:
        raise ValueError("Type a question about the image.")
    if len(question) > MAX_QUESTION_LENGTH:
        raise ValueError(
            f"The question has {len(question)} characters, and {MAX_QUESTION_LENGTH} are allowed: shorten it."
        )
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    options = {"crop_to_patches": False, "add_special_tokens": False, "return_tensors": "pt"}
    inputs = dict(processor(images=image, text=prompt, **options).to(model.device))
    start = time.perf_counter()
    features = model.get_image_features(inputs.pop("pixel_values"), 1, return_dict=True)
    features.last_hidden_state[0, 0, 0].item()  # a GPU returns before it is done; a number has to be waited for
    milliseconds = 1000 * (time.perf_counter() - start)
    inputs["mm_encoder_outputs"] = {"image": features}
    sizes = {"image_sizes": inputs["image_sizes"].tolist()} if "image_sizes" in inputs else {}
    return AskedQuestion(inputs, sizes, milliseconds)


def answer_at(model, processor, asked: AskedQuestion, num_vision_tokens: int, max_new_tokens: int = 64) -> Answer:
    """
    Answers at one count, greedily, so that answers differ by their counts alone.

    Args:
        model ([`TokenFlexForConditionalGeneration`]): The model.
        processor ([`TokenFlexProcessor`]): Its processor.
        asked ([`AskedQuestion`]): What [`ask`] returned.
        num_vision_tokens (`int`): The vision-token count.
        max_new_tokens (`int`, *optional*, defaults to 64): The longest answer in tokens.

    Returns:
        [`Answer`]

    Raises:
        ValueError: If the count is not allowed.
    """
    [grid] = resolve_vision_token_grids(num_vision_tokens, 1, model.config.patch_grid, **asked.sizes)
    options = {"num_vision_tokens": num_vision_tokens, "do_sample": False, "num_beams": 1}
    milliseconds = []
    for length in (1, 1, max_new_tokens):
        clock = _FirstTokenClock()
        start = time.perf_counter()
        output = model.generate(**asked.inputs, **options, max_new_tokens=length, streamer=clock)
        milliseconds.append(1000 * (clock.time - start))
    reply = processor.decode(output[0, asked.inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return Answer(reply.strip(), grid, clock.prompt_tokens, statistics.median(milliseconds))


def choose_count(model, asked: AskedQuestion) -> tuple[int, float]:
    """
    The count that `"auto"` chooses, and how many milliseconds the choosing took.

    Raises:
        ValueError: If the model has not been calibrated.
    """
    start = time.perf_counter()
    [count] = model.choose_vision_tokens(**asked.inputs)
    return count, 1000 * (time.perf_counter() - start)


def draw_grid(image: Image.Image, grid: tuple[int, int]) -> Image.Image:
    """
    The image, at most 360 pixels wide and high, with the lines between vision tokens. (Where a grid does not divide the
    patch grid, neighbouring tokens share the patches under a line.)

    Args:
        image (`PIL.Image.Image`): The image.
        grid (`tuple[int, int]`): (rows, columns).

    Returns:
        `PIL.Image.Image`, in mode RGB.

    Example:

    ```python
    >>> from PIL import Image
    >>> from tokenflex.inference.page import draw_grid

    >>> draw_grid(Image.new("RGB", (4000, 1000)), grid=(4, 4)).size
    (360, 90)
    ```
    """
    shown = image.convert("RGB")
    if max(shown.size) > SHOWN_SIDE:
        shown.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    else:
        factor = SHOWN_SIDE // max(shown.size)
        shown = shown.resize((factor * shown.width, factor * shown.height), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(shown, "RGBA")
    for fill, width in (((0, 0, 0, 100), 4), ((255, 255, 255, 255), 2)):  # white with black edges shows on any image
        for row in range(1, grid[0]):
            y = row * shown.height // grid[0]
            pen.line((0, y, shown.width, y), fill, width)
        for column in range(1, grid[1]):
            x = column * shown.width // grid[1]
            pen.line((x, 0, x, shown.height), fill, width)
    return shown


def uploaded_path(file: dict | None) -> str | None:
    """
    The path of what a visitor uploaded or of an example; not of the machine's other files, which a request made by hand may name.

    Args:
        file (`dict`, *optional*): Gradio's record of the file.

    Raises:
        ValueError: If the file is another one.
    """
    path = file.get("path") if isinstance(file, dict) else None
    if path is not None and not gr.utils.is_in_or_equal(path, gr.utils.get_upload_folder()):
        raise ValueError("Choose an image first: upload one, or take an example.")
    return path


def read_image(path: str | Path | None) -> Image.Image:
    """
    Opens and decodes an uploaded file.

    Raises:
        ValueError: If there is none, it is not an image that can be decoded, or it has more than 100 megapixels.
    """
    if path is None:
        raise ValueError("Choose an image first.")
    try:
        with Image.open(path) as image:  # of the pixels nothing is read yet
            if math.prod(image.size) > 1e6 * MAX_MEGAPIXELS:
                raise Image.DecompressionBombError
            return decode_image(image)
    except Image.DecompressionBombError:
        raise ValueError(
            f"The image has more than {MAX_MEGAPIXELS} megapixels, the most that is taken here: make it smaller."
        ) from None
    except BadRowError as error:
        raise ValueError(f"The file is damaged or of a rare kind: {error}. Try another.") from None
    except Exception:  # decoders raise whatever they like on damaged files
        raise ValueError("The file is not an image that can be read. Try a PNG, JPEG or WebP.") from None


def counts_to_show(chosen: int, choices: Sequence[int]) -> dict[int, list[str]]:
    """
    The counts that stand side by side, rising, and why each does.

    Example:

    ```python
    >>> from tokenflex.inference.page import counts_to_show

    >>> counts_to_show(4, choices=[4, 16, 36])
    {4: ['chosen', 'smallest trained'], 36: ['largest trained']}
    ```
    """
    roles = {}
    named = [(chosen, "chosen"), (min(choices), "smallest trained"), (max(choices), "largest trained")]
    for count, role in sorted(named, key=lambda pair: pair[0]):
        roles.setdefault(count, []).append(role)
    return roles


def synthetic_examples(processor) -> list[tuple[Image.Image, str]]:
    """Images and questions of the set that the embedded model was trained on; none for any other model's processor."""
    tokenizer = processor.tokenizer
    if len(tokenizer) > 512 or any(len(tokenizer.tokenize(f" {color}")) > 1 for color in COLORS):
        return []
    examples = []
    scenes = (draw_scene(EXAMPLE_SEED, index) for index in itertools.count())
    for family in EXAMPLE_FAMILIES:
        scene = next(scene for scene in scenes if family in [kind for kind, *_ in scene.questions])
        questions = [question for kind, question, _ in scene.questions if kind == family]
        examples.append((scene.image, questions[len(questions) // 2]))
    return examples


def read_examples(folder: str | Path) -> list[tuple[str, str]]:
    """
    The images of a folder by name, each with the question what is in it.

    Raises:
        ValueError: If there is no such folder, or no image in it.
    """
    kinds = Image.registered_extensions()
    files = sorted(Path(folder).iterdir()) if Path(folder).is_dir() else []
    examples = [(str(file), FOLDER_QUESTION) for file in files if file.suffix.lower() in kinds]
    if not examples:
        raise ValueError(f"`examples`={str(folder)!r} is not a folder with images: give one, or leave it out.")
    return examples


# Gradio's own file for semi-bold letters holds next to none, so that other fonts would mix in.
STYLE = """<style>
@font-face { font-family: "Source Sans Pro"; font-weight: 600; src: url("static/fonts/SourceSansPro/SourceSansPro-Bold.woff2"); }
.flex-head h1 { margin: 0 0 4px; font-size: 28px; font-weight: 600; }
.flex-head p, .flex-note { margin: 0; color: var(--body-text-color-subdued); }
.flex-question { margin: 0 0 12px; font-size: 20px; font-weight: 600; }
.flex-cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 14px; margin-bottom: 12px; }
.flex-card { border: 1px solid var(--border-color-primary); border-radius: 10px; overflow: hidden; }
.flex-card.chosen { border-color: var(--color-accent); box-shadow: 0 0 0 1px var(--color-accent); }
.flex-card header { padding: 10px 14px; }
.flex-card header b { display: block; font-size: 18px; font-weight: 600; }
.flex-card header span { font-size: 13px; color: var(--body-text-color-subdued); }
.flex-card.chosen header span { color: var(--color-accent); font-weight: 600; }
.flex-card img { display: block; width: 100%; max-height: 320px; object-fit: contain; background: #8883; }
.flex-card .answer { margin: 0; padding: 12px 14px; font-size: 22px; font-weight: 600; overflow-wrap: anywhere; }
.flex-card dl { margin: 0; padding: 0 14px 12px; display: grid; grid-template-columns: 1fr auto; row-gap: 3px; font-size: 14px; }
.flex-card dt { color: var(--body-text-color-subdued); }
.flex-card dd { margin: 0; text-align: right; font-variant-numeric: tabular-nums; }
#examples thead { display: none; }
#examples tbody { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); }
#examples tr { display: flex; align-items: center; background: none; border: 0; }
#examples td { text-align: left; border: 0; padding: 6px 10px; }
</style>"""
HEAD = (
    '<div class="flex-head"><h1>TokenFLEX</h1><p>One vision-language model, any number of vision tokens. Ask at a count, '
    "and see it between the smallest and the largest that the model was trained at.</p></div>"
)
EMPTY = '<p class="flex-note">The answers will stand here, side by side.</p>'


def render_card(image: Image.Image, answer: Answer, roles: Sequence[str]) -> str:
    """One count's answer as HTML; whatever the model said is shown as text."""
    rows, columns = answer.grid
    count = rows * columns
    encoded = io.BytesIO()
    draw_grid(image, answer.grid).save(encoded, "PNG")
    source = f"data:image/png;base64,{base64.b64encode(encoded.getvalue()).decode()}"
    figures = {
        "grid": f"{rows} × {columns}",
        "prompt tokens": answer.prompt_tokens,
        "first token": f"{answer.milliseconds_to_first_token:.1f} ms",
    }
    is_chosen = any(role.startswith(("your", "auto")) for role in roles)
    return (
        f'<article class="flex-card{" chosen" * is_chosen}" data-tokens="{count}">'
        f"<header><b>{count} vision token{'s' * (count > 1)}</b><span>{', '.join(roles)}</span></header>"
        f'<img src="{source}" alt="the image in {rows} rows and {columns} columns">'
        f'<p class="answer">{html.escape(answer.text) or "(nothing)"}</p><dl>'
        + "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in figures.items())
        + "</dl></article>"
    )


def render_answers(question: str, cards: Sequence[str], tower_milliseconds: float) -> str:
    """The cards so far, under the question, as HTML."""
    return (
        f'<h2 class="flex-question">{html.escape(question.strip())}</h2><div class="flex-cards">{"".join(cards)}</div>'
        f'<p class="flex-note">The vision tower ran once for all of them: {tower_milliseconds:.1f} ms. First token: from its '
        "features on, the median of three.</p>"
    )


def build_demo(model, processor, examples: Sequence[tuple] | None = None) -> gr.Blocks:
    """
    The page. One question is answered at a time, others wait in Gradio's queue.

    Args:
        model ([`TokenFlexForConditionalGeneration`]): The model.
        processor ([`TokenFlexProcessor`]): Its processor.
        examples (sequence of `(image, question)`, *optional*):
            PIL images or paths, with questions. Defaults to [`synthetic_examples`].

    Returns:
        `gradio.Blocks`: To be launched.
    """
    patch_grid, choices = model.config.patch_grid, sorted(model.config.vision_token_choices)
    examples = synthetic_examples(processor) if examples is None else examples

    def name_count(side: int) -> dict:
        return gr.update(label=f"Vision tokens: {side} × {side} = {side * side}")

    def respond(file: dict | None, question: str, side: int, is_auto: bool = False):
        try:
            image = read_image(uploaded_path(file))
            asked = ask(model, processor, image, question)
            if is_auto:
                count, milliseconds = choose_count(model, asked)
                reason = f"auto chose it in {milliseconds:.1f} ms"
            else:
                count, reason = math.prod(resolve_vision_token_grid((side, side), patch_grid)), "your choice"
            cards = []
            for shown, roles in counts_to_show(count, choices).items():
                roles = [reason if role == "chosen" else role for role in roles]
                cards.append(render_card(image, answer_at(model, processor, asked, shown), roles))
                yield render_answers(question, cards, asked.tower_milliseconds)
        except ValueError as error:
            raise gr.Error(html.escape(str(error)), title="Not answered", print_exception=False) from None

    quietly = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    with gr.Blocks(analytics_enabled=False, title="TokenFLEX", delete_cache=(3600, 86400)) as demo:
        gr.HTML(STYLE + HEAD)
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                image = gr.Image(
                    type="filepath",
                    format="png",
                    sources=["upload", "clipboard"],
                    label="Image",
                    height=260,
                    elem_id="image",
                )
                question = gr.Textbox(label="Question", placeholder="What do you want to know?", elem_id="question")
                middle, _ = resolve_vision_token_grid(choices[len(choices) // 2], patch_grid)
                side = gr.Slider(
                    1,
                    min(patch_grid),
                    middle,
                    step=1,
                    label=name_count(middle)["label"],
                    info=f"The model was trained at {', '.join(map(str, choices))}.",
                    buttons=[],
                    elem_id="side",
                )
                inputs = [image, question, side]
                if model.config.vision_token_chooser is not None:
                    auto = gr.Checkbox(label="auto: let the model choose the count", elem_id="auto")
                    auto.change(lambda is_auto: gr.update(interactive=not is_auto), auto, side, **quietly)
                    inputs.append(auto)
                button = gr.Button("Answer", variant="primary", elem_id="answer")
            with gr.Column(scale=5, min_width=480):
                answers = gr.HTML(EMPTY, elem_id="answers")
        if examples:
            gr.Examples(
                [list(example) for example in examples], [image, question], elem_id="examples", examples_per_page=12
            )
        side.change(name_count, side, side, **quietly)
        # The file comes as it is: decoding it is `read_image`'s, whose messages say what is wrong.
        gr.on(
            [button.click, question.submit],
            respond,
            inputs,
            answers,
            preprocess=False,
            concurrency_limit=1,
            api_visibility="private",
        )
    return demo.queue(max_size=64)


def load(model_name_or_path: str):
    """
    Loads a checkpoint onto the best device there is.

    Args:
        model_name_or_path (`str`): A folder or an id on the Hub.

    Returns:
        `tuple[TokenFlexForConditionalGeneration, TokenFlexProcessor]`
    """
    processor = AutoProcessor.from_pretrained(model_name_or_path)
    return AutoModelForImageTextToText.from_pretrained(model_name_or_path, device_map="auto"), processor


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(prog="tokenflex demo", description="Open a page to ask a checkpoint about images.")
    parser.add_argument("--model_name_or_path", required=True, help="Checkpoint folder or Hub id.")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in. Default: %(default)s.")
    parser.add_argument("--port", type=int, default=7860, help="The page's port. Default: %(default)s.")
    parser.add_argument(
        "--examples", help="A folder of images to offer. Default: synthetic ones, if the embedded model learned them."
    )
    args = parser.parse_args(argv)
    examples = None if args.examples is None else read_examples(args.examples)
    demo = build_demo(*load(args.model_name_or_path), examples)
    demo.launch(server_name=args.host, server_port=args.port, share=False, ssr_mode=False, footer_links=[])
