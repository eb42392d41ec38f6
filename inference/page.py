"""
`tokenflex page`: a page to ask about an image, with the answers of several vision-token counts side by side.

The same page as a Space is an `app.py` of three lines:

```py
from tokenflex.inference.page import build_page, load

build_page(*load("you/your-checkpoint")).launch()
```
"""

import html
import itertools
import math
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from transformers import AutoModelForImageTextToText

from ..checkpoints.adapters import load_processor
from ..choices_tokenflex import count_tokens, resolve_vision_token_grid, sort_choices
from ..data.images import FORMATS, ImageError, decode_upload
from ..data.synthetic import COLORS, draw_scene
from ..processing_tokenflex import read_image
from .cards import EMPTY, HEAD, STYLE, render_answers, render_card
from .comparison import answer_at, ask, choose_count


try:
    import gradio as gr
except ImportError:
    raise ImportError('`tokenflex page` needs gradio: `pip install "tokenflex[page]"`.') from None


MAX_MEGAPIXELS = 100
EXAMPLE_SEED = 1000  # the test seed, whose images no stage of training draws
EXAMPLE_FAMILIES = ("cell_color", "digit_value", "dot_count", "bar_value", "shape_kind", "tallest_bar")
FOLDER_QUESTION = "What is in the image?"


def read_upload(file: dict | None) -> Image.Image:
    """
    Decodes what a visitor uploaded or an example; not the machine's other files, which a request made by hand may
    name.

    Args:
        file (`dict`, *optional*): Gradio's record of the file.

    Raises:
        ValueError:
            If there is none, it is another file, or an image that cannot be decoded or has more than 100 megapixels.
    """
    path = file.get("path") if isinstance(file, dict) else None
    if path is None or not gr.utils.is_in_or_equal(path, gr.utils.get_upload_folder()):
        raise ValueError("Choose an image first: upload one, or take an example.")
    try:
        return decode_upload(Path(path).read_bytes(), MAX_MEGAPIXELS)
    except ImageError as error:
        raise ValueError(f"Choose another image: {error}.") from None


def counts_to_show(chosen: int | str, choices: Sequence[int | str]) -> dict[int | str, list[str]]:
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
    smallest, *_, largest = sort_choices([*choices, *choices])
    for count, role in ((chosen, "chosen"), (smallest, "smallest trained"), (largest, "largest trained")):
        roles.setdefault(count, []).append(role)
    return {count: roles[count] for count in sort_choices(roles)}


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
    examples = [(str(file), FOLDER_QUESTION) for file in files if kinds.get(file.suffix.lower()) in FORMATS]
    if not examples:
        raise ValueError(f"`examples`={str(folder)!r} is not a folder with images: give one, or leave it out.")
    return examples


def build_page(model, processor, examples: Sequence[tuple] | None = None) -> gr.Blocks:
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
    patch_grid, choices = model.config.patch_grid, sort_choices(model.config.vision_token_choices)
    examples = synthetic_examples(processor) if examples is None else examples

    def name_count(side: int) -> dict:
        return gr.update(label=f"Vision tokens: {side} × {side} = {side * side}")

    def respond(file: dict | None, question: str, side: int, is_auto: bool = False):
        try:
            image = read_upload(file)
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
    with gr.Blocks(analytics_enabled=False, title="TokenFLEX", delete_cache=(3600, 86400)) as page:
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
                middle = min(math.isqrt(count_tokens(choices[len(choices) // 2])), *patch_grid)
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
            shown = [[read_image(kept) if isinstance(kept, Image.Image) else kept, asked] for kept, asked in examples]
            gr.Examples(shown, [image, question], elem_id="examples", examples_per_page=12)
        side.change(name_count, side, side, **quietly)
        # The file comes as it is: decoding it is `read_upload`'s, whose messages say what is wrong.
        gr.on(
            [button.click, question.submit],
            respond,
            inputs,
            answers,
            preprocess=False,
            concurrency_limit=1,
            api_visibility="private",
        )
    return page.queue(max_size=64)


def load(model_name_or_path: str):
    """
    Loads a checkpoint onto the best device there is.

    Args:
        model_name_or_path (`str`): A folder or an id on the Hub.

    Returns:
        `tuple[TokenFlexForConditionalGeneration, TokenFlexProcessor]`
    """
    processor = load_processor(model_name_or_path)
    return AutoModelForImageTextToText.from_pretrained(model_name_or_path, device_map="auto"), processor


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(prog="tokenflex page", description="Open a page to ask a checkpoint about images.")
    parser.add_argument("--model_name_or_path", required=True, help="Checkpoint folder or Hub id.")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in. Default: %(default)s.")
    parser.add_argument("--port", type=int, default=7860, help="The page's port. Default: %(default)s.")
    parser.add_argument(
        "--examples", help="A folder of images to offer. Default: synthetic ones, if the embedded model learned them."
    )
    args = parser.parse_args(argv)
    examples = None if args.examples is None else read_examples(args.examples)
    page = build_page(*load(args.model_name_or_path), examples)
    page.launch(server_name=args.host, server_port=args.port, share=False, ssr_mode=False, footer_links=[])
