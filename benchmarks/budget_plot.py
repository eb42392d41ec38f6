"""The plot of `budget.py`."""

import io

import matplotlib


matplotlib.use("Agg")
from matplotlib.figure import Figure  # noqa: E402


COLORS = {64: "tab:blue", 144: "tab:orange", 256: "tab:green"}


def plot_png(figures: dict) -> bytes:
    """
    Against the language model's size: the speed-up to the first token, the tower's share of it, the speed-up of
    decoding.

    Args:
        figures (`dict`): The JSON that `budget.py` prints.

    Returns:
        `bytes`: A PNG image.
    """
    one, four = figures["images_1"], figures["images_4"]
    names = list(one["first_token"])
    figure = Figure(figsize=(14, 4.8), dpi=110, layout="constrained")
    figure.suptitle("What a vision-token count buys with SigLIP-so400m and Qwen2.5: calculated, not measured")
    first, share, decode = figure.subplots(1, 3)

    def draw(axes, values, label, **style):
        axes.plot(names, [values(name) for name in names], label=label, marker="o", markersize=4, **style)

    for count in (64, 144):
        style = {"color": COLORS[count]}
        draw(first, lambda n: one["first_token"][n]["speed_up"][count], f"{count} tokens", **style)  # noqa: B023
        draw(
            first,
            lambda n: one["first_token"][n]["speed_up_kept_features"][count],  # noqa: B023
            f"{count} tokens, features kept",
            linestyle=":",
            **style,
        )
    tokens = one["first_token"]
    for count, color in COLORS.items():
        draw(share, lambda n: 100 * tokens[n]["tower_share"][count], f"{count} tokens", color=color)  # noqa: B023
    for batch, linestyle in ((32, "-"), (1, "--")):
        for part, images, color in ((four, "4 images", "tab:purple"), (one, "1 image", "tab:blue")):
            draw(
                decode,
                lambda n: part["decoding"][n]["steps"][batch]["speed_up"][64],  # noqa: B023
                f"batch {batch}, {images}",
                color=color,
                linestyle=linestyle,
            )
    first.set_title("Time to first token, by FLOPs, 1 image")
    first.set_ylabel("times faster than at 256 tokens")
    first.set_ylim(bottom=1)
    share.set_title("The tower's share of it")
    share.set_ylabel("% of FLOPs to the first token")
    share.set_ylim(0, 100)
    decode.set_title("A step of decoding, by bytes, 64 tokens")
    decode.set_ylabel("times faster than at 256 tokens")
    decode.set_ylim(bottom=1)
    for axes in (first, share, decode):
        axes.set_xlabel("language model")
        axes.grid(alpha=0.25)
        axes.legend(fontsize=9, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
