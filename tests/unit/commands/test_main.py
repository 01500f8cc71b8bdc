"""The command line around the subcommands."""

from __future__ import annotations

import argparse

import pytest

from vllm_moecxl.commands import doctor
from vllm_moecxl.commands.main import EXIT_USAGE, main
from vllm_moecxl.errors import ConfigError


@pytest.mark.parametrize("argv", [["frobnicate"], [], ["doctor", "--unknown"]])
def test_wrong_usage_is_one_sentence(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    output = capsys.readouterr()
    assert stop.value.code == EXIT_USAGE
    assert output.out == ""
    assert output.err.count("\n") == 1 and output.err.startswith("moecxl")


def test_wrong_subcommand_is_named_with_the_right_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["frobnicate"])
    error = capsys.readouterr().err
    assert "frobnicate" in error and "doctor" in error


def test_an_expected_error_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(_: argparse.Namespace) -> int:
        raise ConfigError("this and that")

    monkeypatch.setattr(doctor, "run", fail)
    assert main(["doctor"]) == EXIT_USAGE
    assert capsys.readouterr().err == "moecxl doctor: this and that\n"


def test_help_lists_the_subcommands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert "doctor" in capsys.readouterr().out
