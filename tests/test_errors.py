"""Text of a file is shown as one printable line, on the terminal and in Markdown."""

from __future__ import annotations

import pickle
import re

import pytest

from timm_ghn import errors
from timm_ghn.cli.tables import aligned
from timm_ghn.errors import LIMIT, LONGEST, printable
from timm_ghn.publish.card import Markdown, markdown

#: Names as a file could hold them: terminal sequences, line ends, text that runs backwards, markup, megabytes.
HOSTILE = (
    '\x1b]0;owned\x07\x1b[2J', 'a\r\nb\tc\x00', 'ghn\u202egnp.exe\u2028\u200b', '\udcff', '| a | b |\n\n# Title',
    '<img src=x onerror=alert(1)>', '[here](https://evil.example)', '`code` ``` \\` **bold** _it_ ~~x~~ $x$', '![x](y)',
    'www.evil.example https://evil.example me@evil.example', 'x' * 10**7, '\x1b' * 10**6, ' ' * 200 + 'x', '',
)  # fmt: skip


CASES = pytest.mark.parametrize('text', HOSTILE, ids=range(len(HOSTILE)))


@CASES
def test_text_is_one_printable_line_of_a_hundred_characters(text):
    shown = printable(text)
    assert shown.isprintable()
    assert all(line.isprintable() for line in aligned(('name', 'size'), [(text[:1000], '7'), ('a', '10')]))
    assert len(shown) <= LIMIT
    assert shown == shown.strip()
    assert printable(shown) == shown


def test_plain_text_stays_and_what_is_cut_says_so():
    for text in ('a GHN, 3 MB (näher); 99.9 %', 'C:\\x', 'x' * LIMIT):
        assert printable(text) == text
    assert printable('x' * (LIMIT + 1)) == 'x' * (LIMIT - 3) + '...'
    assert printable(None) == 'None'
    assert printable('a\x1bb') == 'a\\x1bb'
    assert printable('x' * 2000, 2000) == 'x' * 2000


def test_markup_is_escaped():
    assert markdown('[x](https://y) <b> |*`_a_`\\') == r'\[x\](https\://y) \<b\> \|\*\`\_a\_\`\\'
    assert markdown('www.evil.example, a@b') == r'www\.evil.example, a\@b'
    for plain in ('ghn_tiny', 'user/my-ghn', '99.94 % (1,234 of 5,678; 3 of 4 tensors)', 'noise 3e-05 (seed 3)'):
        assert markdown(plain) == plain


@CASES
def test_no_markup_is_left(text):
    shown = markdown(text)
    assert not re.search(r'(?<!\\)(?:\\\\)*[`*\[\]<>|~$]', shown)
    assert '\n' not in shown
    assert markdown(shown) is shown, 'what is Markdown is not escaped again'


def test_our_markup_stays():
    assert markdown(Markdown('a `b`')) == 'a `b`'


@CASES
def test_an_error_is_one_printable_line(text):
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.GHNError)]
    assert len(kinds) > 5
    for kind in kinds:
        error = kind(f'expected a name (got {text})')
        assert str(error).isprintable()
        assert str(error).startswith('expected a name (got')
        assert len(str(error)) <= LONGEST
        assert str(pickle.loads(pickle.dumps(error))) == str(error)
