"""The page: controls, the race, the windows, the figures, and the API. All that a visitor leaves is in ``gr.State``."""

import functools
import time
from pathlib import Path

import gradio as gr

import figures
import method
import render
from inside import look_inside
from race import LIMITS, MAX_CHARACTERS, MODEL_THREAD, PLAIN, Settings, StopFlag, identical, prompt_ids, race
from text import answer_pieces

HERE = Path(__file__).resolve().parent
EXAMPLES = {
    "Arithmetic": "Tom has 12 apples. He buys 8 more apples and gives 5 apples to his sister. How many are left?",
    "Percentages": "There are 30 students in a class. 40% of them are boys. How many girls are there in the class?",
    "Booking": "I want to book a table at a restaurant.",
    "Travel": "I need a ride to the airport tomorrow morning.",
    "Code": "Write a Python function that adds two numbers.",
    "Explaining": "Explain in simple words why the sky is blue.",
}
LABELS = {
    "temperature": "Temperature",
    "window_size": "Window length",
    "tree_depth": "Tree depth",
    "tree_top_k": "Branches",
    "tree_nodes": "Nodes",
    "max_new_tokens": "Longest answer",
    "seed": "Seed",
}
FAIRNESS = (
    "Measured one after the other, so that neither takes the other's time: first the plain target, then PPOW, each "
    "with the whole machine and shown while it runs. The replay puts them side by side at the speed that was measured. "
    "One short run scatters; Figures pools all of yours."
)
READY = render.note("Pick an example or write a prompt, then press Race (or Shift+Enter in the prompt).")
MODEL = {"concurrency_id": "model", "concurrency_limit": 1}  # one visitor at a time has the machine
QUIET = {"api_visibility": "private", "show_progress": "hidden"}


class Page:
    """The page of one pair.

    Args:
        load: () -> Pair, kept by the caller; raises ValueError with a message for the visitor.
        on_device: wraps the generator that computes (``spaces.GPU`` on a ZeroGPU).
    """

    def __init__(self, load, on_device=lambda compute: compute):
        self.load, self.compute = load, on_device(self._compute)

    # -- what runs -----------------------------------------------------------------------------------------------------

    def _compute(self, settings: Settings, session: str):
        """Race, then look inside: yields (runs, windows per drafter or None)."""
        pair, stop, runs = self.load(), StopFlag(session), []
        for runs in race(pair, settings, stop):
            yield runs, None
        if any(run.stopped for run in runs):
            return
        ids = prompt_ids(pair, settings)
        jobs = {run.name: (pair, pair.drafters[run.name], ids, run, settings) for run in runs[1:]}
        yield runs, {name: MODEL_THREAD.submit(look_inside, *job).result() for name, job in jobs.items()}

    def run(self, request: gr.Request, *values):
        """A visitor's race, from the controls' values and the races so far: yields (panes, status, races, last)."""
        *values, races = values
        nothing = gr.skip()
        try:
            settings = Settings(*values).check()
            pair = self.load()
            names, depth = [PLAIN, *pair.drafters], settings.options.get("window_size") or settings.tree_depth
            texts, shown = {}, 0.0
            yield render.panes([], names, texts, depth), render.note("Measuring ..."), nothing, None
            for found in self.compute(settings, request.session_hash or ""):
                runs, windows = found
                finished = runs[-1].seconds is not None
                if not finished and time.monotonic() - shown < 0.1:
                    continue
                texts[runs[-1].name] = answer_pieces(pair.tokenizer, runs[-1].tokens)
                shown = time.monotonic()
                yield render.panes(runs, names, texts, depth), nothing, nothing, nothing
            same = identical(runs, settings.temperature)
            last = None
            if windows is not None:
                races = [*races, figures.record(settings, runs)][-figures.KEPT :]
                last = {"windows": windows, "words": words_of(pair.tokenizer, windows)}
            yield nothing, render.verdict(runs, settings.temperature, same), races, last
        except ValueError as error:
            yield self.waiting(), render.problem(str(error)), nothing, None

    def answer(
        self,
        prompt: str,
        temperature: float = 0.0,
        drafting: str = "chain",
        window_size: int = 10,
        tree_depth: int = 7,
        tree_top_k: int = 10,
        tree_nodes: int = 60,
        max_new_tokens: int = 128,
        seed: int = 0,
        request: gr.Request = None,
    ) -> dict:
        """Race the plain target against the target with its drafter on one prompt.

        Args:
            prompt: the question, at most 4000 characters.
            temperature: 0 for the likeliest token, up to 2.
            drafting: "chain" (of window_size tokens) or "tree" (tree_depth, tree_top_k, tree_nodes).
            window_size: drafted tokens per window, 1 to 16.
            tree_depth: longest window of a tree, 1 to 10.
            tree_top_k: branches per level, 1 to 16.
            tree_nodes: nodes verified at once, 1 to 128.
            max_new_tokens: longest answer, 8 to 256.
            seed: of the sampling.

        Returns:
            settings, identical (true or false at temperature 0, else null), and per system its text, token ids,
            seconds, tokens_per_second and steps; per drafter also speedup, acceptance_length, per_position, differences
            and, per verification, drafted, accepted and gained.
        """
        try:
            tree = (tree_depth, tree_top_k, tree_nodes)
            settings = Settings(prompt, temperature, drafting, window_size, *tree, max_new_tokens, seed).check()
            pair = self.load()
            *_, (runs, _) = self.compute(settings, request.session_hash or "")
            return report(pair, settings, runs)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error

    # -- what is shown -------------------------------------------------------------------------------------------------

    def build(self) -> gr.Blocks:
        """The Gradio app, its queue set."""
        with gr.Blocks(title="PPOW: watch speculative decoding", analytics_enabled=False) as app:
            gr.HTML(self.header(), padding=False)
            prompt, controls = self.controls()
            with gr.Row(elem_classes="actions"):
                start = gr.Button("Race", variant="primary", elem_id="race")
                stop = gr.Button("Stop", elem_id="stop")
                reset = gr.Button("Reset", elem_id="reset")
                link = gr.Button("Copy link", elem_id="link")
            status = gr.HTML(READY, padding=False, elem_id="status")
            panes = gr.HTML(self.waiting(), padding=False, elem_id="panes")
            gr.HTML(render.legend() + f'<p class="hint">{FAIRNESS}</p>', padding=False)
            races, last = gr.State([], time_to_live=3600), gr.State(None, time_to_live=3600)
            with gr.Tabs():
                with gr.Tab("Inside a window"):
                    which, shown = self.windows(last)
                with gr.Tab("Figures"):
                    charts = gr.HTML(self.charts([]), padding=False, elem_id="figures")
                with gr.Tab("Method"):
                    gr.HTML(self.method(), padding=False)
                with gr.Tab("API"):
                    gr.Markdown(API, elem_classes="api")
            inputs = list(controls.values())
            outputs = [panes, status, races, last]
            for trigger in (start.click, prompt.submit):
                ready = trigger(clear_stop, outputs=[], queue=False, **QUIET)
                waits = {"show_progress": "minimal", "show_progress_on": [status], "api_visibility": "private"}
                raced = ready.then(self.run, [*inputs, races], outputs, **waits, **MODEL)
                raced.then(self.charts, races, charts, queue=False, **QUIET).then(
                    windows_of, [last, which], shown, queue=False, **QUIET
                ).then(None, js="() => window.ppow.replay(1, true)", **QUIET)
            stop.click(set_stop, queue=False, **QUIET)
            fresh = [*defaults().values(), READY, self.waiting(), [], None, self.charts([])]
            reset.click(set_stop, queue=False, **QUIET).then(
                lambda: fresh, outputs=[*inputs, status, panes, races, last, charts], queue=False, **QUIET
            ).then(windows_of, [last, which], shown, queue=False, **QUIET)
            link.click(None, inputs, js=f"(...values) => window.ppow.share({list(controls)}, values)", **QUIET)
            app.load(from_link, outputs=[*inputs, status], queue=False, **QUIET)
            gr.api(self.answer, api_name="race", **MODEL)
        return app.queue(max_size=64, default_concurrency_limit=8)

    def header(self) -> str:
        return (
            "<header class='masthead'><div><h1>PPOW</h1><p>A light drafter proposes a window of tokens, the target "
            "verifies it in one forward. The text stays exactly the target's; only the speed changes.</p>"
            f"<p class='hint'>{self.about()}</p></div>"
            '<button type="button" class="small" data-theme-toggle aria-label="Dark or light">◐</button></header>'
        )

    def about(self) -> str:
        """What runs here, or why nothing does."""
        try:
            return render.html.escape(self.load().describe())
        except ValueError as error:
            return f"<span class='problem' role='alert'>⚠ {render.html.escape(str(error))}</span>"

    def method(self) -> str:
        """How the drafter that is shown was trained."""
        try:
            return method.page(self.load().trained)
        except (ValueError, TypeError):  # no pair, or a record of another form
            return method.page(None)

    def names(self) -> list[str]:
        try:
            return [PLAIN, *self.load().drafters]
        except ValueError:
            return [PLAIN, "PPOW"]

    def waiting(self) -> str:
        return render.panes([], self.names(), {}, 0)

    def controls(self) -> tuple[gr.Textbox, dict]:
        """The inputs, in the order of the fields of ``Settings``."""
        start, found = defaults(), {}
        prompt = gr.Textbox(
            start["prompt"], label="Prompt", lines=2, max_lines=8, max_length=MAX_CHARACTERS, elem_id="prompt"
        )
        with gr.Row(elem_classes="examples"):
            for name, text in EXAMPLES.items():
                gr.Button(name, size="sm", min_width=80, elem_classes="example").click(
                    lambda text=text: text, outputs=prompt, queue=False, **QUIET
                )

        def slider(name: str, step=1, visible=True):
            low, high = LIMITS[name]
            shape = {"step": step, "min_width": 150, "buttons": []}
            return gr.Slider(low, high, start[name], label=LABELS[name], visible=visible, elem_id=name, **shape)

        with gr.Accordion("Settings", open=True), gr.Row(elem_classes="knobs"):
            drafting = gr.Radio(["chain", "tree"], value="chain", label="Drafting", min_width=150, elem_id="drafting")
            found = {"prompt": prompt, "temperature": slider("temperature", 0.1), "drafting": drafting}
            found["window_size"] = slider("window_size")
            tree = ("tree_depth", "tree_top_k", "tree_nodes")
            found |= {name: slider(name, visible=False) for name in tree}
            found["max_new_tokens"] = slider("max_new_tokens", 8)
            found["seed"] = gr.Number(0, label=LABELS["seed"], precision=0, min_width=150, elem_id="seed")
        drafting.change(
            lambda kind: [gr.update(visible=kind == "chain")] + [gr.update(visible=kind == "tree")] * 3,
            drafting, [found[name] for name in ("window_size", *tree)], queue=False, **QUIET,
        )  # fmt: skip
        return prompt, found

    def windows(self, last: gr.State) -> tuple:
        """The stepper over a run's verifications: the choice of a drafter, and the parts :func:`windows_of` fills."""
        names = self.names()[1:]
        which = gr.Radio(names, value=names[0], label="Drafter", visible=len(names) > 1, elem_id="which")
        with gr.Row(elem_classes="stepper", visible=False) as stepper:
            before = gr.Button("◀ Previous", size="sm", min_width=90, elem_id="previous")
            number = gr.Slider(
                1, 2, 1, step=1, label="Verification", interactive=True, buttons=[], elem_id="verification"
            )
            after = gr.Button("Next ▶", size="sm", min_width=90, elem_id="next")
        window = gr.HTML(render.window([], 1, {}), padding=False, elem_id="window")
        shown = [stepper, number, window]
        # number and window come in one answer: a change of the number that had to ask for its window could be late
        for button, way in ((before, -1), (after, 1)):
            go = functools.partial(step, way=way)
            button.click(go, [last, number, which], [number, window], queue=False, **QUIET)
        number.input(show_window, [last, number, which], window, queue=False, trigger_mode="always_last", **QUIET)
        which.change(windows_of, [last, which], shown, queue=False, **QUIET)
        return which, shown

    def charts(self, races: list[dict]) -> str:
        """The figures of a visitor's races so far."""
        if not races:
            return '<p class="hint">Run a race first; the figures of all your races gather here.</p>'
        acceptance = self.load().part("transcript_ppow").Acceptance
        groups: dict[str, list[dict]] = {}
        for one in races:
            groups.setdefault(one["label"], []).append(one)
        names = [name for name in races[-1]["systems"] if name != PLAIN]
        pooled = {label: {n: figures.summarize(group, n, acceptance) for n in names} for label, group in groups.items()}
        newest = races[-1]
        current = pooled[newest["label"]]
        lengths = {
            name: [
                (group[0]["window"], pooled[label][name].speedup)
                for label, group in groups.items()
                if (group[0]["drafting"], group[0]["temperature"]) == (newest["drafting"], newest["temperature"])
            ]
            for name in names
        }
        per_position = {name: f.per_position for name, f in current.items()}
        histogram = {name: f.histogram for name, f in current.items()}
        return (
            render.figures_table(pooled, {label: group[0]["temperature"] for label, group in groups.items()})
            + f'<p class="hint">Charts: {render.html.escape(newest["label"])}. Every window length you race at is a '
            'point of the last one.</p><div class="charts">'
            + render.bars("Accepted, given all before", "position in the window", per_position, True)
            + render.bars("Verifications by tokens gained", "tokens gained, bonus included", histogram, False)
            + render.points("Speedup over window length", "window length", lengths)
            + "</div>"
        )


def defaults() -> dict:
    return vars(Settings(EXAMPLES["Arithmetic"]))


def clear_stop(request: gr.Request) -> None:
    StopFlag(request.session_hash or "").clear()


def set_stop(request: gr.Request) -> None:
    StopFlag(request.session_hash or "").set()


def from_link(request: gr.Request):
    """Control values from a shared link's query; what is not valid is said and left at its default.

    Without such a link nothing is set: the answer may come after the visitor's first keystrokes.
    """
    values, given = defaults(), dict(request.query_params)
    if not values.keys() & given.keys():
        return [gr.skip()] * (len(values) + 1)
    try:
        for name in values.keys() & given.keys():
            values[name] = given[name] if isinstance(values[name], str) else float(given[name])
        values = vars(Settings(**values).check())
        return [*values.values(), gr.skip()]
    except ValueError as error:
        return [*defaults().values(), render.problem(f"The link's settings were not used. {error}")]


def words_of(tokenizer, windows: dict) -> dict:
    """Token id -> its piece, for every token that the windows mention."""
    ids = set()
    for w in (w for found in windows.values() for w in found):
        ids |= {*w["nodes"], *w["gained"], *(token for token, _ in w["target_top"] + w["draft_top"])}
    return {token: tokenizer.decode([token]) for token in ids}


def windows_of(last: dict | None, name: str):
    """The stepper after a race, or for another drafter: back at the first verification."""
    count = len(last["windows"][name]) if last else 0
    number = gr.update(maximum=max(count, 2), value=1)
    return gr.update(visible=count > 1), number, show_window(last, 1, name)


def show_window(last: dict | None, number: int, name: str) -> str:
    return render.window(last["windows"][name], int(number), last["words"]) if last else render.window([], 1, {})


def step(last: dict | None, number: int, name: str, way: int) -> tuple[int, str]:
    """The verification one before or after, and its window."""
    number = min(max(int(number) + way, 1), len(last["windows"][name]) if last else 1)
    return number, show_window(last, number, name)


def report(pair, settings: Settings, runs: list) -> dict:
    """A finished race as the API answers it."""
    acceptance = pair.part("transcript_ppow").Acceptance
    kept, systems = figures.record(settings, runs), {}
    for run in runs:
        one = {
            "text": pair.tokenizer.decode(run.tokens, skip_special_tokens=True),
            "tokens": run.tokens,
            "seconds": run.seconds,
            "tokens_per_second": run.rate,
            "steps": [[seconds, len(tokens)] for seconds, tokens in run.steps],
        }
        if run.name != PLAIN:
            f = figures.summarize([kept], run.name, acceptance)
            one |= {"speedup": f.speedup, "acceptance_length": f.acceptance_length, "per_position": f.per_position}
            one |= {"differences": run.differences}
            one |= {"drafted": run.drafted, "accepted": run.accepted, "gained": run.gained}
        systems[run.name] = one
    return {"settings": vars(settings), "identical": kept["identical"], "systems": systems}


API = """
Every race can be run from Python; it waits in the same queue as the page.

```python
from gradio_client import Client

client = Client("ORG/SPACE")  # or the address of this page
race = client.predict(prompt="I want to book a table.", window_size=10, max_new_tokens=64, api_name="/race")
print(race["systems"]["PPOW"]["speedup"], race["identical"])
```

Arguments besides `prompt`, with their defaults: `temperature=0`, `drafting="chain"` or `"tree"`, `window_size=10`,
`tree_depth=7`, `tree_top_k=10`, `tree_nodes=60`, `max_new_tokens=128`, `seed=0`. What is out of range raises an error
that says what is allowed. The result holds `settings`, `identical` and, per system, `text`, `tokens`, `seconds`,
`tokens_per_second` and `steps`; per drafter also `speedup`, `acceptance_length`, `per_position`, `differences` (near
ties and faults, where greedy tokens are not the target's) and, per verification, `drafted`, `accepted` and `gained`.
"""
