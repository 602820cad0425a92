"""The benchmark runs and reports what it measured; nothing here looks at the numbers but what is computed from them."""

import contextlib
import io
import shlex
import sys

import pytest

#: Says 12.5 seconds as a whole and 2 without the graph, whatever the network.
OTHER = """
import sys
for number, network in enumerate(sys.stdin):
    print(12.5 + number, 2 + number, flush=True)
"""


@pytest.fixture
def benchmark(script, monkeypatch):
    """The script; what it would run in new processes is run in this one."""

    def here(code: str, *argv: str) -> list[float]:
        monkeypatch.setattr(sys, 'argv', ['-c', *argv])
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, {})
        return [float(number) for number in printed.getvalue().split()]

    monkeypatch.setattr(script('fresh_process'), 'in_new_process', here)
    return script('predict')


def other(code: str) -> str:
    """A command that answers as other implementations do."""
    return f'{sys.executable} -c {shlex.quote(code)}'


def test_tables_of_every_part_are_written(benchmark, tmp_path, capsys):
    out = tmp_path / 'tables.md'
    parts = ['compare', 'tag', 'speed', 'memory', 'load', 'imports']
    options = ['--ghn', 'ghn_tiny', '--networks', 'test_resnet', '--repeat', '1', '--device', 'cpu']
    benchmark.main([*options, '--parts', *parts, '--compare', other(OTHER), '--out', str(out)])
    text = out.read_text()
    titles = ('side by side', "timm's tag, post-processing", 'speed, milliseconds and share', 'memory of a prediction')
    for title in (*titles, 'loading from our own format', 'Import of timm_ghn beyond'):
        assert title in text
    rows = [line.split(' | ') for line in text.splitlines() if line.startswith('| test_resnet')]
    assert len(rows) == 4
    assert (rows[0][2], rows[0][5]) == ('13.500 (13.500)', '3.000 (3.000)')  # the first run does not count
    assert f'--compare COMMAND --out {out}' in text
    captured = capsys.readouterr()
    assert text.strip() == captured.out.strip()
    assert [line.split(' |')[0] for line in captured.err.splitlines() if line.startswith('| ')] == [
        '| ghn_tiny',
        '| `ghn_tiny`',
        '| the tag `X.ghn_tiny`',
    ]


def test_the_script_is_itself_such_a_command(benchmark, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'stdin', io.StringIO('test_resnet\ntest_resnet\n'))
    benchmark.main(['--seconds', 'ghn_tiny', '--device', 'cpu'])
    seconds = [[float(number) for number in line.split()] for line in capsys.readouterr().out.splitlines()]
    assert [len(numbers) for numbers in seconds] == [2, 2]
    assert min(whole - prediction for whole, prediction in seconds) > 0
