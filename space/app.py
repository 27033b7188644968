"""The Space: watch a PPOW drafter race the plain target. ``python app.py``, or ``ppow space`` from the repository."""

import importlib.util

if importlib.util.find_spec("spaces"):  # a ZeroGPU wants to be imported before torch
    import spaces

    ZERO_GPU = spaces.config.Config.zero_gpu
else:
    spaces, ZERO_GPU = None, False

import functools
from pathlib import Path

import gradio as gr

from page import Page
from pair import find_names, load_pair
from race import ROUNDS, warm_up

ROUND_SECONDS = 30  # that a ZeroGPU is asked for per round; the warm-up is one more
ON_DEVICE = spaces.GPU(duration=ROUND_SECONDS * (1 + ROUNDS)) if spaces else lambda compute: compute
HERE = Path(__file__).resolve().parent
BLUE = "#1d5fc4"  # white text on it has the contrast that readers need
THEME = gr.themes.Default(primary_hue="blue", secondary_hue="blue").set(
    **{f"button_primary_background_fill{end}": BLUE for end in ("", "_dark", "_hover", "_hover_dark")},
    **{f"button_primary_text_color{end}": "white" for end in ("", "_dark")},
    color_accent=BLUE,
    body_text_color_dark="#d3d8de",  # white glares on black
)


@functools.cache
def load():
    """The pair, loaded once; a failure is not kept, so that the next visitor tries again.

    Raises:
        ValueError: no pair, or one that cannot be loaded or run here, such as one that a GPU has no memory for.
    """
    names = find_names()
    try:
        pair = load_pair(names, "cuda" if ZERO_GPU else None)
        if not ZERO_GPU:
            warm_up(pair)
    except (RuntimeError, OSError) as error:
        why = str(error).partition("\n")[0]
        raise ValueError(f"{names.target} and its drafter do not run here: {why}") from error
    return pair


def launch(**options):
    """Build the page and serve it; options as for ``launch`` of Gradio."""
    try:
        load()
    except ValueError as error:  # the page says the same and tries again with every race
        print(f"ppow space: {error}")
    look = {
        "css_paths": [HERE / "style.css"],
        "head_paths": [HERE / "head.html"],
        "footer_links": ["api", "settings"],
        "theme": THEME,
    }
    return Page(load, ON_DEVICE).build().launch(**look, **options)


if __name__ == "__main__":
    launch()
