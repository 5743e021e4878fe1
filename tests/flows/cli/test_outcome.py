"""How a command ends: its exit status, and what it says."""

import click
import pytest

from flows.cli.outcome import reports_errors
from quantlib.errors import ModelError, StoreError


def end_of(error):
    """The exit status of a command that raises an error."""

    @reports_errors
    def command():
        raise error

    with pytest.raises(SystemExit) as end:
        command()
    return end.value.code


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ModelError("No weights."), 2, "quantflow: No weights."),
        (StoreError("A blob is damaged."), 1, "quantflow: A blob is damaged."),
        (KeyError("x"), 1, "This is a bug in quantflow or in what it uses. Run with --verbose for the traceback."),
        (KeyboardInterrupt(), 130, "Interrupted. Run the same command again: finished stages are kept."),
    ],
)
def test_an_error_is_one_message_and_a_status(error, status, said, capsys):
    assert end_of(error) == status
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("explicit", [True, False])
def test_ctrl_c_inside_the_import_of_a_compiled_module_is_an_interruption(explicit, capsys):
    wrapped = ImportError("numpy.core.multiarray failed to import")
    if explicit:
        wrapped.__cause__ = KeyboardInterrupt()
    else:
        middle = RuntimeError()
        middle.__context__, wrapped.__context__ = KeyboardInterrupt(), middle
    assert end_of(wrapped) == 130
    assert "Interrupted" in capsys.readouterr().err


@pytest.mark.parametrize("error", [click.UsageError("no such option"), BrokenPipeError()])
def test_what_click_ends_itself_is_left_to_it(error):
    @reports_errors
    def command():
        raise error

    with pytest.raises(type(error)):
        command()
