"""The page: controls, the race, the windows, the figures, and the API.

Only a race asks the server. Everything else (examples, settings of a link, Reset, steps through the windows) happens in
the browser, and every answer to a race carries the number of its press: the browser drops what a newer press of Race
or Reset has overtaken (``ppow.shown`` in ``head.html``). So no late answer overwrites a newer one.
"""

import json
import time
import traceback
from pathlib import Path

import gradio as gr

import figures
import method
import render
from inside import look_inside
from race import (
    LIMITS,
    MAX_CHARACTERS,
    MODEL_THREAD,
    PLAIN,
    ROUNDS,
    Settings,
    StopFlag,
    identical,
    prompt_ids,
    race,
    speedup,
)
from text import answer_pieces
from visitor import Visitor

HERE = Path(__file__).resolve().parent
EXAMPLES = {  # that SmolLM2-135M-Instruct answers well; `ppow demo` asks them, too
    row["category"]: row["prompt"] for row in map(json.loads, (HERE / "prompts.jsonl").read_text("utf-8").splitlines())
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
    "Measured one after the other, each with the whole machine. First a warm-up, which is shown while it is written "
    f"and does not count; then {ROUNDS} rounds, in changing order. The medians count, and the range of the rounds is "
    "shown. The replay puts the median runs side by side."
)
READY = render.note("Pick an example or write a prompt, then press Race (or Shift+Enter in the prompt).")
MODEL = {"concurrency_id": "model", "concurrency_limit": 1}  # one visitor at a time has the machine
PARTS = ("panes", "status", "inside", "figures")  # of the page, in the order in which a race answers
MANY_WINDOWS = 30  # with fewer a share hangs on a few of them
BROKEN = (ValueError, RuntimeError, OSError)  # gr.Error is the first, a GPU whose memory is full the second
AT_REST = 1.0  # seconds between two empty answers while nothing changes: Gradio ends a race only between answers
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
            texts, shown, told = {}, 0.0, None
            start = (render.panes([], names, texts, depth, asked), render.measuring(None, ROUNDS), render.MEASURING)
            yield *(part(press, html) for html in start), nothing, nothing
            for found in self.compute(settings, stop, True):
                runs, windows = found
                live = runs[-1].seconds is None
                if time.monotonic() - shown < (0.1 if live else AT_REST if told is not None else 0):
                    continue
                panes = said = nothing
                if told is None:  # the warm-up grows; what is measured is not shown before its end
                    texts |= {run.name: answer_pieces(pair.tokenizer, run.tokens) for run in runs[-1:]}
                    panes = part(press, render.panes(runs, names, texts, depth, asked))
                done = None if live or len(runs) < len(names) else min(len(run.rates) for run in runs)
                if done != told and done < ROUNDS:
                    said, told = part(press, render.measuring(done, ROUNDS)), done
                yield panes, said, nothing, nothing, nothing
                shown = time.monotonic()
            texts = {run.name: answer_pieces(pair.tokenizer, run.tokens) for run in runs}
            panes = render.panes(runs, names, texts, depth, asked)
            same = identical(runs, settings.temperature)
            verdict, inside, charts = part(press, render.verdict(runs, settings.temperature, same)), nothing, nothing
            if windows is not None:
                visitor.keep(press, figures.record(settings, runs))
                inside = part(press, render.stepper(windows, words_of(pair.tokenizer, windows)))
                charts = part(press, self.charts(visitor.races))
            # all in one answer, so that no part tells of another race
            yield part(press, panes, replay=windows is not None), verdict, inside, charts, visitor
        except BROKEN as error:
            fresh = (self.waiting(), render.problem(reason(error)), render.NO_RACE)
            yield *(part(press, html) for html in fresh), nothing, nothing
        finally:
            visitor.end(press)

    def endpoint(self, start: Settings):
        """The function behind the API, with ``start`` for its defaults."""

        def answer(
            prompt: str,
            temperature: float = start.temperature,
            drafting: str = start.drafting,
            window_size: int = start.window_size,
            tree_depth: int = start.tree_depth,
            tree_top_k: int = start.tree_top_k,
            tree_nodes: int = start.tree_nodes,
            max_new_tokens: int = start.max_new_tokens,
            seed: int = start.seed,
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
                seconds, tokens_per_second and steps (of the median run) and the rates of all rounds; per drafter
                also speedup, speedup_range (lowest and highest of a round), acceptance_length, per_position,
                differences and, per verification, drafted, accepted and gained.
            """
            try:
                tree = (tree_depth, tree_top_k, tree_nodes)
                settings = Settings(prompt, temperature, drafting, window_size, *tree, max_new_tokens, seed).check()
                pair = self.load()
                *_, (runs, _) = self.compute(settings, StopFlag(), False)
                return report(pair, settings, runs)
            except BROKEN as error:
                raise gr.Error(reason(error), print_exception=False) from error

        return answer

    # -- what is shown -------------------------------------------------------------------------------------------------

    def build(self) -> gr.Blocks:
        """The Gradio app, its queue set."""
        with gr.Blocks(title="PPOW: watch speculative decoding", analytics_enabled=False) as app:
            gr.HTML(self.header(), padding=False)
            begin = self.start()
            prompt = self.prompt(begin.prompt)
            with gr.Row(elem_classes="actions"):
                start = gr.Button("Race", variant="primary", elem_id="race")
                stop = gr.Button("Stop", elem_id="stop")
                reset = gr.Button("Reset", elem_id="reset")
                link = gr.Button("Copy link", elem_id="link")
            fresh = {"panes": self.waiting(), "status": READY, "inside": render.NO_RACE, "figures": self.charts([])}
            status = shown("status", fresh, "")
            panes = shown("panes", fresh, 'watch("value", () => ppow.arrived(props.value));')
            gr.HTML(render.legend() + f'<p class="hint">{FAIRNESS}</p>', padding=False)
            controls = {"prompt": prompt, **self.controls(begin)}
            with gr.Tabs():
                with gr.Tab("Inside a window"):
                    inside = shown("inside", fresh, 'watch("value", () => ppow.first(element, props.value));')
                with gr.Tab("Figures"):
                    charts = shown("figures", fresh, "")
                with gr.Tab("Method"):
                    gr.HTML(self.method(), padding=False)
                with gr.Tab("API"):
                    gr.Markdown(API.format(**vars(begin)), elem_classes="api")
            press, visitor = gr.Number(0, precision=0, visible=False), gr.State(Visitor(), time_to_live=3600)
            inputs, outputs = list(controls.values()), [panes, status, inside, charts]
            gr.on(
                (start.click, prompt.submit), self.run, [press, *inputs, visitor], [*outputs, visitor],
                js="(_, ...values) => [ppow.next(), ...values]", validator=arrives, trigger_mode="multiple",
                show_progress="minimal", show_progress_on=[status], api_visibility="private", **MODEL,
            )  # fmt: skip
            stop.click(Visitor.stop, [visitor, press], js="() => [null, ppow.press]", queue=False, **QUIET)
            again = json.dumps([list(vars(begin).values()), [[part, fresh[part]] for part in PARTS]])
            reset.click(None, None, [*inputs, *outputs], js=f"() => ppow.reset(...{again})", **QUIET)
            reset.click(Visitor.reset, [visitor, press], js="() => [null, ppow.press]", queue=False, **QUIET)
            link.click(None, inputs, js=f"(...values) => ppow.share({list(controls)}, values)", **QUIET)
            opened = json.dumps([vars(begin), limits(), render.problem("{}")])
            app.load(None, None, [*inputs, status], js=f"() => ppow.open(...{opened})", **QUIET)
            gr.api(self.endpoint(begin), api_name="race", **MODEL)
        return app.queue(max_size=64, default_concurrency_limit=8)

    def header(self) -> str:
        return (
            "<header class='masthead'><div><h1>PPOW</h1><p>A small drafter proposes a window of tokens, and the target "
            "checks all of them in one pass. The text is the target's own; only the time changes.</p>"
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

    def start(self) -> Settings:
        """What controls, Reset, links and the API start with: the drafting is the loaded pair's own."""
        prompt = next(iter(EXAMPLES.values()))
        try:
            return Settings.own(self.load(), prompt)
        except ValueError:
            return Settings(prompt)

    def waiting(self) -> str:
        return render.panes([], self.names(), {}, 0)

    def prompt(self, first: str) -> gr.Textbox:
        """The prompt, and the examples below it."""
        prompt = gr.Textbox(first, label="Prompt", lines=2, max_lines=8, max_length=MAX_CHARACTERS, elem_id="prompt")
        with gr.Row(elem_classes="examples"):
            for name, text in EXAMPLES.items():
                button = gr.Button(name, size="sm", min_width=80, elem_classes="example")
                button.click(None, None, prompt, js=f"() => {json.dumps(text)}", **QUIET)
        return prompt

    def controls(self, start: Settings) -> dict:
        """The other inputs, in the order of the fields of ``Settings``."""

        def slider(name: str, step=1):
            low, high = LIMITS[name]
            shape = {"step": step, "min_width": 150, "buttons": []}
            return gr.Slider(low, high, getattr(start, name), label=LABELS[name], elem_id=name, **shape)

        with gr.Accordion("Settings", open=True), gr.Row(elem_classes="knobs"):
            how = gr.Radio(["chain", "tree"], value=start.drafting, label="Drafting", min_width=150, elem_id="drafting")
            found = {"temperature": slider("temperature", 0.1), "drafting": how}
            found["window_size"] = slider("window_size")
            # style.css hides those of the other way of drafting
            found |= {name: slider(name) for name in ("tree_depth", "tree_top_k", "tree_nodes")}
            found["max_new_tokens"] = slider("max_new_tokens", 8)
            found["seed"] = gr.Number(0, label=LABELS["seed"], precision=0, min_width=150, elem_id="seed")
        return found

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
        few = min(sum(found) for found in histogram.values())
        draw = render.bars if few >= MANY_WINDOWS else render.numbers_table
        drawn = draw("Accepted, given all before", "position in the window", per_position, True)
        drawn += draw("Verifications by tokens gained", "tokens gained, bonus included", histogram, False)
        if max(len({window for window, _ in found}) for found in lengths.values()) > 1:
            drawn += render.points("Speedup over window length", "window length", lengths)
        ran = newest["systems"][names[0]]["drafting"]
        said = [f"Below: {render.html.escape(newest['label'])}; what drafted were {render.html.escape(ran)}."]
        if few < MANY_WINDOWS:
            said.append(f"{few} windows so far, which is too few for bars; from {MANY_WINDOWS} on they are drawn.")
        said.append("Race at several window lengths to see the speedup over them.")
        return (
            render.figures_table(pooled, {label: group[0]["temperature"] for label, group in groups.items()})
            + f'<p class="hint">{" ".join(said)}</p><div class="charts">{drawn}</div>'
        )


def limits() -> dict:
    """Per number among the settings: lowest, highest, whether it is whole."""
    return {name: [low, high, isinstance(low, int)] for name, (low, high) in LIMITS.items()}


def reason(error: Exception) -> str:
    """What a visitor is told. The rest of what is no bad input is in the server's log."""
    if isinstance(error, ValueError) and not isinstance(error, gr.Error):
        return str(error)
    traceback.print_exception(error)
    said = str(getattr(error, "message", error)).strip().partition("\n")[0]
    return f"The race broke off: {said or type(error).__name__}"


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
            "rates": run.rates,
            "steps": [[seconds, len(tokens)] for seconds, tokens in run.steps],
        }
        if run.name != PLAIN:
            f = figures.summarize([kept], run.name, acceptance)
            _, *spread = speedup(run, runs[0])
            one |= {"speedup": f.speedup, "speedup_range": spread, "acceptance_length": f.acceptance_length}
            one |= {"per_position": f.per_position, "differences": run.differences}
            one |= {"drafted": run.drafted, "accepted": run.accepted, "gained": run.gained}
        systems[run.name] = one
    return {"settings": vars(settings), "identical": kept["identical"], "systems": systems}


API = """
Every race can be run from Python; it waits in the same queue as the page.

```python
from gradio_client import Client

client = Client("ORG/SPACE")  # or the address of this page
race = client.predict(prompt="What is the capital of France?", max_new_tokens=64, api_name="/race")
print(race["systems"]["PPOW"]["speedup"], race["identical"])
```

Arguments besides `prompt`, with their defaults: `temperature={temperature:g}`, `drafting="{drafting}"` ("chain" or
"tree"), `window_size={window_size}`, `tree_depth={tree_depth}`, `tree_top_k={tree_top_k}`, `tree_nodes={tree_nodes}`,
`max_new_tokens={max_new_tokens}`, `seed={seed}`. What is out of range raises an error that says what is allowed. The
result holds `settings`, `identical` and, per system, `text`, `tokens`, `seconds`, `tokens_per_second` and `steps` of
the median run and the `rates` of all rounds; per drafter also `speedup`, `speedup_range`, `acceptance_length`,
`per_position`, `differences` (near ties and faults, where greedy tokens are not the target's) and, per verification,
`drafted`, `accepted` and `gained`.
"""
