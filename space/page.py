"""The page: controls, the race, the windows, the figures, and the API.

Only a race asks the server. Everything else (examples, settings of a link, Reset, steps through the windows) happens in
the browser, and every answer to a race carries the number of its press: the browser drops what a newer press of Race
or Reset has overtaken (``ppow.shown`` in ``head.html``). So no late answer overwrites a newer one.
"""

import json
import time

import gradio as gr

import figures
import method
import render
from inside import look_inside
from race import LIMITS, MAX_CHARACTERS, MODEL_THREAD, PLAIN, Settings, StopFlag, identical, prompt_ids, race
from text import answer_pieces
from visitor import Visitor

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
PARTS = ("panes", "status", "inside", "figures")  # of the page, in the order in which a race answers
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

    def _compute(self, settings: Settings, stop: StopFlag, inside: bool):
        """Race, then look inside if asked to: yields (runs, windows per drafter or None)."""
        pair, runs = self.load(), []
        for runs in race(pair, settings, stop):
            yield runs, None
        if inside and not any(run.stopped for run in runs):
            ids = prompt_ids(pair, settings)
            jobs = {run.name: (pair, pair.drafters[run.name], ids, run, settings) for run in runs[1:]}
            yield runs, {name: MODEL_THREAD.submit(look_inside, *job).result() for name, job in jobs.items()}

    def run(self, press: int, *values):
        """The race of a press, from the controls' values and the visitor: yields all of ``PARTS`` and the visitor."""
        *values, visitor = values
        stop, nothing = visitor.begin(press), gr.skip()
        try:
            settings = Settings(*values).check()
            pair = self.load()
            names, depth = [PLAIN, *pair.drafters], settings.options.get("window_size") or settings.tree_depth
            asked = f"{settings.label}: {settings.prompt}"
            texts, shown = {}, 0.0
            start = (render.panes([], names, texts, depth, asked), render.note("Measuring ..."), render.MEASURING)
            yield *(part(press, html) for html in start), nothing, nothing
            for found in self.compute(settings, stop, True):
                runs, windows = found
                if runs[-1].seconds is None and time.monotonic() - shown < 0.1:
                    continue
                texts[runs[-1].name] = answer_pieces(pair.tokenizer, runs[-1].tokens)
                shown = time.monotonic()
                panes = render.panes(runs, names, texts, depth, asked)
                yield part(press, panes), nothing, nothing, nothing, nothing
            same = identical(runs, settings.temperature)
            verdict, inside, charts = part(press, render.verdict(runs, settings.temperature, same)), nothing, nothing
            if windows is not None:
                visitor.keep(press, figures.record(settings, runs))
                inside = part(press, render.stepper(windows, words_of(pair.tokenizer, windows)))
                charts = part(press, self.charts(visitor.races))
            # all in one answer, so that no part tells of another race
            yield part(press, panes, replay=windows is not None), verdict, inside, charts, visitor
        except ValueError as error:
            fresh = (self.waiting(), render.problem(str(error)), render.NO_RACE)
            yield *(part(press, html) for html in fresh), nothing, nothing
        finally:
            visitor.end(press)

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
            *_, (runs, _) = self.compute(settings, StopFlag(), False)
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
            fresh = {"panes": self.waiting(), "status": READY, "inside": render.NO_RACE, "figures": self.charts([])}
            status = shown("status", fresh, "")
            panes = shown("panes", fresh, 'watch("value", () => ppow.arrived(props.value));')
            gr.HTML(render.legend() + f'<p class="hint">{FAIRNESS}</p>', padding=False)
            with gr.Tabs():
                with gr.Tab("Inside a window"):
                    inside = shown("inside", fresh, 'watch("value", () => ppow.first(element, props.value));')
                with gr.Tab("Figures"):
                    charts = shown("figures", fresh, "")
                with gr.Tab("Method"):
                    gr.HTML(self.method(), padding=False)
                with gr.Tab("API"):
                    gr.Markdown(API, elem_classes="api")
            press, visitor = gr.Number(0, precision=0, visible=False), gr.State(Visitor(), time_to_live=3600)
            inputs, outputs = list(controls.values()), [panes, status, inside, charts]
            gr.on(
                (start.click, prompt.submit), self.run, [press, *inputs, visitor], [*outputs, visitor],
                js="(_, ...values) => [ppow.next(), ...values]", validator=arrives, trigger_mode="multiple",
                show_progress="minimal", show_progress_on=[status], api_visibility="private", **MODEL,
            )  # fmt: skip
            stop.click(Visitor.stop, [visitor, press], js="() => [null, ppow.press]", queue=False, **QUIET)
            begin = json.dumps([list(defaults().values()), [[part, fresh[part]] for part in PARTS]])
            reset.click(None, None, [*inputs, *outputs], js=f"() => ppow.reset(...{begin})", **QUIET)
            reset.click(Visitor.reset, [visitor, press], js="() => [null, ppow.press]", queue=False, **QUIET)
            link.click(None, inputs, js=f"(...values) => ppow.share({list(controls)}, values)", **QUIET)
            opened = json.dumps([defaults(), limits(), render.problem("{}")])
            app.load(None, None, [*inputs, status], js=f"() => ppow.open(...{opened})", **QUIET)
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
                button = gr.Button(name, size="sm", min_width=80, elem_classes="example")
                button.click(None, None, prompt, js=f"() => {json.dumps(text)}", **QUIET)

        def slider(name: str, step=1):
            low, high = LIMITS[name]
            shape = {"step": step, "min_width": 150, "buttons": []}
            return gr.Slider(low, high, start[name], label=LABELS[name], elem_id=name, **shape)

        with gr.Accordion("Settings", open=True), gr.Row(elem_classes="knobs"):
            drafting = gr.Radio(["chain", "tree"], value="chain", label="Drafting", min_width=150, elem_id="drafting")
            found = {"prompt": prompt, "temperature": slider("temperature", 0.1), "drafting": drafting}
            found["window_size"] = slider("window_size")
            # style.css hides those of the other way of drafting
            found |= {name: slider(name) for name in ("tree_depth", "tree_top_k", "tree_nodes")}
            found["max_new_tokens"] = slider("max_new_tokens", 8)
            found["seed"] = gr.Number(0, label=LABELS["seed"], precision=0, min_width=150, elem_id="seed")
        return prompt, found

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


def limits() -> dict:
    """Per number among the settings: lowest, highest, whether it is whole."""
    return {name: [low, high, isinstance(low, int)] for name, (low, high) in LIMITS.items()}


def part(press: int, html: str, **more) -> dict:
    """What a part of the page shows, as an answer to a press."""
    return {"press": press, "html": html, **more}


def shown(name: str, fresh: dict, script: str) -> gr.HTML:
    """A part of the page. Each value that arrives passes ``ppow.shown``, which drops what belongs to an older press."""
    template = f'${{typeof ppow === "undefined" ? value.html : ppow.shown("{name}", value)}}'
    return gr.HTML(part(0, fresh[name]), html_template=template, js_on_load=script, padding=False, elem_id=name)


def arrives(press: int, *values) -> list:
    """Runs when a press of Race arrives, before it waits for its turn: older races of this visitor end."""
    values[-1].begin(press)
    return [None] * (len(values) + 1)


def words_of(tokenizer, windows: dict) -> dict:
    """Token id -> its piece, for every token that the windows mention."""
    ids = set()
    for w in (w for found in windows.values() for w in found):
        ids |= {*w["nodes"], *w["gained"], *(token for token, _ in w["target_top"] + w["draft_top"])}
    return {token: tokenizer.decode([token]) for token in ids}


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
