"""Everything that timm_ghn raises on purpose.

All kinds share :class:`GHNError`, so that a caller can catch the package's errors and nothing else; each also is
the built-in error that a caller who does not know the package would expect.
"""

import sys
from types import TracebackType

#: Most characters of a name that comes from a file.
LIMIT = 100
#: Most characters of a whole message or of a cell of a table.
LONGEST = 2000


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


def first_line(error: BaseException) -> str:
    """Kind and first line of an error: messages of torch and of the Hub's client may have pages behind it."""
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), 'no reason given')
    return f'{type(error).__name__}: {reason}'


class GHNError(Exception):
    """Base of all errors of this package.

    Its message is one printable line, whatever it quotes: names in a file may hold control characters, which a terminal
    would obey.
    """

    def __init__(self, message: object = '') -> None:
        super().__init__(printable(message, LONGEST))


class UnsupportedModelError(GHNError, ValueError):
    """A network cannot be traced, or has nothing that a GHN could predict."""


class CheckpointError(GHNError, ValueError):
    """A GHN file is damaged, does not match its configuration, or holds values that are not finite."""


class UnsafeCheckpointError(CheckpointError):
    """A pickled file asks for something outside the allow-list; nothing of it was executed."""


class ConfigError(GHNError, ValueError):
    """Options or a configuration file contradict themselves, or come from a newer version."""


class GHNNotFoundError(GHNError, LookupError):
    """No GHN has this name, or it can be reached neither on the Hub nor in the cache."""


class PredictionError(GHNError, RuntimeError):
    """Values to be written are not finite, or a parameter cannot be written; the model was left as it was."""


class HubError(GHNError, RuntimeError):
    """The Hub cannot be reached, or refuses what is pushed to it."""


class GHNFallbackWarning(UserWarning):
    """The default GHN could not be had, and the one inside the package serves instead."""


class DataError(GHNError, ValueError):
    """A data set cannot be found or read, or does not have what training needs."""


class TrainingError(GHNError, RuntimeError):
    """Training cannot go on; what was finished is on the disk."""


def report_interrupt(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A ``sys.excepthook`` that reports Ctrl-C in one line; anything else as Python does."""
    if issubclass(kind, KeyboardInterrupt):
        print('timm-ghn: error: interrupted', file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)
