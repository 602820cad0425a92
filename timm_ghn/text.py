"""Text that came from a file, as it is shown to people: on the terminal, in errors, on model cards."""

from __future__ import annotations

import re

#: Most characters of a name that a file holds.
LIMIT = 100
#: Most characters of a whole message or of a cell of a table.
LONGEST = 2000

#: What Markdown reads as markup inside a line, links without brackets among it. An underscore inside a word is none.
_MARKUP = re.compile(
    r'[\\`*\[\]<>|~$&@]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|:(?=//)|(?<=www)\.(?=\w)', re.ASCII | re.IGNORECASE
)


class Markdown(str):
    """Text that is Markdown already: our markup, in which everything from files is escaped."""

    __slots__ = ()


def printable(text: object, limit: int = LIMIT) -> str:
    """One printable line of text.

    Runs of white space become one space; control characters, and those that reorder or hide text, are escaped as Python
    does.

    Args:
        text: What to show.
        limit: Most characters; what is longer is cut, and ends in '...'.
    """
    line = ' '.join(str(text).split())
    # What is cut anyway is not looked at: a file may hold megabytes.
    shown = ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in line[: limit + 1])
    return shown if len(shown) <= limit else f'{shown[: limit - 3]}...'


def markdown(text: object, limit: int = LIMIT) -> Markdown:
    """Text as :func:`printable` gives it, in which Markdown finds no markup; :class:`Markdown` stays as it is."""
    return text if isinstance(text, Markdown) else Markdown(_MARKUP.sub(r'\\\g<0>', printable(text, limit)))


def code(text: object) -> Markdown:
    """A code span of Markdown; plain text where a span cannot hold it."""
    shown = printable(text)
    return markdown(text) if not shown or set('`|') & set(shown) else Markdown(f'`{shown}`')
