"""`quantflow export` and `quantflow predict`."""

import harness
import pytest
from click.testing import CliRunner

from flows.cli import commands, outcome


@pytest.fixture
def quantflow(tmp_path, monkeypatch):
    """Runs a command line in an empty folder; returns (exit status, output)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments):
        result = CliRunner().invoke(commands.main, [str(argument) for argument in arguments])
        return result.exit_code, result.output

    return call


def test_export_writes_the_winner_and_says_what_to_do_with_it(undisturbed, quantflow, tmp_path):
    home, _ = undisturbed
    status, said = quantflow("export", harness.run_id_of(home), "--to", "digits", "--home", home)
    assert status == 0, said
    assert (tmp_path / "digits" / "model.json").is_file()
    assert "python digits/predict.py IMAGE" in said


def test_export_of_an_unknown_run_is_wrong_input(undisturbed, quantflow, tmp_path):
    home, _ = undisturbed
    status, said = quantflow("export", "nope", "--to", "digits", "--home", home)
    assert status == outcome.WRONG_INPUT
    assert f"The newest are: {harness.run_id_of(home)}" in said
    assert list(tmp_path.iterdir()) == []
