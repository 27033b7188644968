"""The Space: watch a PPOW drafter race the plain target. ``python app.py``, or ``ppow space`` from the repository."""

import importlib.util

if importlib.util.find_spec("spaces"):  # a ZeroGPU wants to be imported before torch
    import spaces

    ON_DEVICE = spaces.GPU(duration=120)
    ZERO_GPU = spaces.config.Config.zero_gpu
else:
    ON_DEVICE, ZERO_GPU = (lambda compute: compute), False

import functools
from pathlib import Path

import gradio as gr

from page import Page
from pair import find_names, load_pair
from race import warm_up

HERE = Path(__file__).resolve().parent
BLUE = "#1d5fc4"  # white text on it has the contrast that readers need
THEME = gr.themes.Default(primary_hue="blue", secondary_hue="blue").set(
    **{f"button_primary_background_fill{end}": BLUE for end in ("", "_dark", "_hover", "_hover_dark")},
    **{f"button_primary_text_color{end}": "white" for end in ("", "_dark")},
    color_accent=BLUE,
)


@functools.cache
def load():
    """The pair, loaded once; a failure is not kept, so that the next visitor tries again."""
    pair = load_pair(find_names(), "cuda" if ZERO_GPU else None)
    if not ZERO_GPU:
        warm_up(pair)
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
