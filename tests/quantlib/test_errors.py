"""What an error of a library says of what was tried."""

import pytest

from quantlib.errors import reason_of


def test_the_reason_is_the_first_line_with_words():
    assert reason_of(ValueError("\n  \nno such axis\nmore")) == "no such axis"
    assert reason_of(ValueError()) == "ValueError"


def test_torchscripts_reason_is_the_last_line():
    said = "The following operation failed in the TorchScript interpreter.\nTraceback\nRuntimeError: shape"
    assert reason_of(RuntimeError(said)) == "RuntimeError: shape"


def test_an_error_that_ctrl_c_caused_is_no_reason():
    error = ImportError("failed to import")
    error.__context__ = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        reason_of(error)
