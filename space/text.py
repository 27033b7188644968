"""Token ids as pieces of text, and text as safe HTML."""

import html


def pieces(tokenizer, ids: list[int]) -> list[str]:
    """One piece per token; their concatenation is the decoded text.

    A character that several tokens spell stands at its last one, before it the pieces are empty. A token is decoded
    after the ones before it, since some tokenizers write the first word of a text without its blank.
    """
    found, before, pending = [], [], []
    for token in ids:
        pending.append(token)
        head = tokenizer.decode(before)
        piece = tokenizer.decode(before + pending)[len(head) :]
        if piece.endswith("\ufffd") and len(pending) < 4:
            found.append("")
            continue
        found.append(piece)
        before, pending = pending, []
    if pending:
        found[-1] = tokenizer.decode(before + pending)[len(tokenizer.decode(before)) :]
    return found


def answer_pieces(tokenizer, ids: list[int]) -> list[str]:
    """As :func:`pieces`, with nothing for special tokens such as the end of the answer."""
    special = set(tokenizer.all_special_ids)
    return ["" if token in special else piece for token, piece in zip(ids, pieces(tokenizer, ids))]


def visible(piece: str) -> str:
    """A piece on its own: blanks and line ends shown by a mark, as safe HTML."""
    shown = piece.replace("\n", "⏎").replace("\t", "⇥")
    shown = "␣" * (len(shown) - len(shown.lstrip(" "))) + shown.lstrip(" ")
    return html.escape(shown) if shown else "∅"
