"""Model card templates, filled from metrics.json and the provenance of a run and from nothing else."""

from pathlib import Path


def render(name: str, facts: dict) -> str:
    """A card as Markdown.

    Args:
        name: ``target`` or ``drafter``, a template of this folder.
        facts: everything the template may say.

    Raises:
        ValueError: for an unknown template, or a fact that the template needs and ``facts`` lacks.
    """
    import jinja2

    folder = Path(__file__).parent
    known = sorted(path.name.removesuffix(".md.jinja") for path in folder.glob("*.md.jinja"))
    if name not in known:
        raise ValueError(f"No card template {name!r}; there are {', '.join(known)}.")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown, not HTML
    )
    try:
        return environment.get_template(f"{name}.md.jinja").render(facts)
    except (jinja2.UndefinedError, TypeError) as error:
        raise ValueError(f"The card {name!r} needs a fact that the run did not record: {error}.") from None
