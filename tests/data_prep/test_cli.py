from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from data_prep import cli
from data_prep.errors import PassingFault, UserError


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--date", "2025_07_01"], {"date": "2025_07_01"}),
        (["--text", "1, 2"], {"text": "1, 2"}),
        (["--rate=1e-4"], {"rate": "1e-4"}),
        (["--offset", "-3"], {"offset": "-3"}),
        (["--latent.num_patches", "8", "--a.b=8"], {"latent.num_patches": "8", "a.b": "8"}),
        (["--samples-per-shard", "5"], {"samples_per_shard": "5"}),
        (["--flag", "--other", "x"], {"flag": "True", "other": "x"}),
        (["--notes"], {"notes": "True"}),
        (["--trace", "--blank", "\n"], {"trace": "True", "blank": "\n"}),
        (["--equation", "a=b"], {"equation": "a=b"}),
        (["--equation=a=b"], {"equation": "a=b"}),
        (["--input", "-"], {"input": "-"}),
        (["--empty", ""], {"empty": ""}),
        (["--text=--quoted words"], {"text": "--quoted words"}),
        (["--text", "line\nline"], {"text": "line\nline"}),
        (["--name", "None", "--truth", "True"], {"name": "None", "truth": "True"}),
        ([], {}),
    ],
)
def test_values_stay_as_typed(words: list[str], expected: dict[str, str]) -> None:
    assert cli.parse(words) == expected


def test_repeated_options() -> None:
    assert cli.parse(["--choices", "red", "--choices=blue"], {"choices"}) == {"choices": ["red", "blue"]}
    with pytest.raises(UserError, match="--x is given twice"):
        cli.parse(["--x", "1", "--x", "2"])


@pytest.mark.parametrize(
    "words",
    [
        ["loose"],
        ["--x", "1", "loose"],
        ["--x", "a", "-", "b"],
        ["--x", "1", "--", "y"],
        ["--=3"],
        ["--3x", "1"],
        ["---x"],
    ],
)
def test_loose_words_are_refused(words: list[str]) -> None:
    with pytest.raises(UserError, match="unexpected word"):
        cli.parse(words)


@dataclass
class Options:
    size: int
    rate: float = 0.5
    on: bool = False
    kind: Literal["a", "b"] = "a"
    out: Path | None = None
    names: list[str] | None = None
    data: Path | str | None = None


def test_binding_converts_by_annotation() -> None:
    given: dict[str, Any] = {
        "size": "7",
        "rate": "1e-4",
        "on": "True",
        "kind": "b",
        "out": "x/y",
        "names": "one",
        "data": "https://host/x",
    }
    assert cli.bind(Options, given) == {
        "size": 7, "rate": 1e-4, "on": True, "kind": "b", "out": Path("x/y"), "names": ["one"],
        "data": "https://host/x",
    }  # fmt: skip
    assert cli.convert(Path | str | None, "~/x") == Path.home() / "x"
    assert "--data path or URL (default none)" in cli.help_text(Options, "p")


def test_all_problems_at_once() -> None:
    with pytest.raises(UserError) as caught:
        cli.bind(Options, {"rat": "1", "rate": "nan", "on": "yes", "kind": "c"})
    assert caught.value.lines == (
        "unknown option --rat; did you mean --rate?",
        "--size is missing",
        "--rate nan: expected a number",
        "--on yes: expected true or false",
        "--kind c: expected one of a, b",
    )


@pytest.mark.parametrize("text", ["2025_07_01", "1.0", "one", ""])
def test_whole_numbers_only(text: str) -> None:
    with pytest.raises(UserError, match="expected a whole number"):
        cli.bind(Options, {"size": text})


def command(*, size: int = 3, names: list[str] | None = None, **rest: str) -> None:
    """Measure things."""
    if size < 0:
        raise UserError("--size: too small", "--size: try 3")
    print(size, names, rest)


def test_run_passes_what_remains(capsys: pytest.CaptureFixture[str]) -> None:
    cli.run(command, ["--size=4", "--names", "a", "--names", "b", "--more.deep", "1_0"])
    assert capsys.readouterr().out == "4 ['a', 'b'] {'more.deep': '1_0'}\n"


def test_run_reports_in_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.run(command, ["--size", "-1"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: --size: too small\nerror: --size: try 3\n"


def test_a_fault_that_may_pass_has_a_status_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> None:
        raise PassingFault("the disk is away")

    with pytest.raises(SystemExit) as caught:
        cli.run(broken, [])
    assert caught.value.code == 1
    assert capsys.readouterr().err == "error: the disk is away\n"


def test_interrupt(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as caught:
        cli.run(interrupted, [])
    assert caught.value.code == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_sigterm(capsys: pytest.CaptureFixture[str]) -> None:
    before, cleaned = signal.getsignal(signal.SIGTERM), []

    def terminated() -> None:
        with cli.terminated_as_interrupted():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(5)
            finally:
                cleaned.append(True)

    with pytest.raises(SystemExit) as caught:
        cli.run(terminated, [])
    assert caught.value.code == 143
    assert capsys.readouterr().err == "error: interrupted\n"
    assert cleaned and signal.getsignal(signal.SIGTERM) == before


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    cli.run(command, ["--help"])
    shown = capsys.readouterr().out
    assert "Measure things." in shown
    assert "--size integer (default 3)" in shown


def test_help_of_a_command_in_parts(capsys: pytest.CaptureFixture[str]) -> None:
    """Options that a command hands on are listed under the heading of where they go."""

    def part(*, depth: int, kind: Literal["a", "b"] = "a") -> None: ...

    cli.run(command, ["--help"], parts={"deep": part})
    shown = capsys.readouterr().out
    assert shown.endswith("\n\ndeep:\n  --depth integer (required)\n  --kind a|b (default a)\n")


def test_options_with_names_that_python_keeps(capsys: pytest.CaptureFixture[str]) -> None:
    def keeps(*, from_: int) -> None:
        print(from_)

    cli.run(keeps, ["--from", "3"])
    cli.run(keeps, ["--help"])
    assert capsys.readouterr().out.startswith("3\n")
    assert cli.options_of(keeps).keys() == {"from"}
    with pytest.raises(SystemExit):
        cli.run(keeps, ["--from_", "3"])
    assert "unknown option --from_; did you mean --from?" in capsys.readouterr().err
