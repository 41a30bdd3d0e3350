"""Names and tokens as they stand in a figure: on as many lines as there is room for, and safe in plotly's markup."""

import textwrap

from steerlens.figures.theme import short_label


def escaped(text: str) -> str:
    """A text whose signs of markup are seen as they are.

    Quotes stay: plotly knows no entity for them, and would show `&quot;`.

    >>> escaped('a<b> & "c"')
    'a&lt;b&gt; &amp; "c"'
    """
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def shown(token: str, width: int = 24) -> str:
    """A token as it stands in a figure: spaces and breaks seen, cut to a width, safe in plotly's markup.

    >>> shown(" rain"), shown("a<b>"), shown("extraordinary", 6)
    ('·rain', 'a&lt;b&gt;', 'extra…')
    """
    signs = ["\u00b7" if sign == " " else sign if sign.isprintable() else repr(sign)[1:-1] for sign in token]
    return escaped(_cut("".join(signs) or "\u2205", width))


def shown_name(name: str, width: int = 80) -> str:
    """A name of an instruction or a vector in words, on one line.

    >>> shown_name("change_case:english_capital"), shown_name("<i> of my own", 6)
    ('english capital', '&lt;i&gt; o…')
    """
    return escaped(_cut(short_label(name), width))


def name_lines(name: str, width: int, *, most: int | None = None) -> str:
    """A name in words, over several lines.

    Args:
        name: of an instruction or a vector; a line break in it stays.
        width: of a line, in characters.
        most: how many lines; what does not fit is cut off.

    >>> name_lines("detectable_format:number_highlighted_sections", 18)
    'number highlighted<br>sections'
    """
    lines = [line for part in short_label(name).split("\n") for line in textwrap.wrap(part, width)]
    if most is not None and len(lines) > most:
        lines[most - 1 :] = [_cut(lines[most - 1] + " " + lines[most], width)]
    return "<br>".join(map(escaped, lines))


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1].rstrip() + "\u2026"
