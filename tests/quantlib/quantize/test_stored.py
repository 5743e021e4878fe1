"""Stored models: whatever their state, one function opens them, and they come back exactly."""

import dataclasses
import io
from dataclasses import replace

import pytest
import torch
from schemes import scheme
from torch import nn

from quantlib.graph import fusion
from quantlib.models import checkpoint
from quantlib.models.checkpoint import Header
from quantlib.quantize import calibration, conversion, preparation, stored
from quantlib.runtimes.engine import use_engine

Made = tuple[nn.Module, Header]
STATES = ["float", "fused", "fused for QAT", "observed", "calibrated", "trainable", "int8", "int8 of QAT"]


@pytest.fixture
def make(tiny_model, tiny_header, train_shard, engine):
    """A model in some state, as the stages make it, and its header."""

    def make_model(state, qconfig="fbgemm"):
        mode = "qat" if state in {"fused for QAT", "trainable", "int8 of QAT"} else "eval"
        header = replace(tiny_header, fused=mode)
        fused = fusion.fuse_model(tiny_model, mode)
        if state == "float":
            return tiny_model, tiny_header
        if state.startswith("fused"):
            return fused, header
        if state == "observed":
            model, header = preparation.observe(fused, ("features.0",)), replace(header, observed=("features.0",))
        else:
            model, header = preparation.prepare(fused, scheme(qconfig), mode), replace(header, scheme=scheme(qconfig))
        calibration.calibrate(model, train_shard, batch_size=36)
        if state.startswith("int8"):
            model, header = conversion.convert(model, engine), replace(header, engine=engine)
        return model, header

    return make_model


# One scale per weight tensor, and one per channel; x86 and onednn weights are stored like fbgemm's.
@pytest.mark.parametrize("qconfig", ["default", "fbgemm"])
@pytest.mark.parametrize("state", STATES)
def test_a_stored_model_comes_back_bit_for_bit(make, val_inputs, engine, state, qconfig):
    model, header = make(state, qconfig)

    content = checkpoint.save(model, header)
    opened, its_header = stored.open_model(content)

    assert its_header == header
    assert header.state == state.split(" ", maxsplit=1)[0]
    assert opened.training == model.training
    assert checkpoint.save(model, header) == content
    assert checkpoint.save(opened, its_header) == content
    with torch.inference_mode(), use_engine(engine):
        assert torch.equal(opened.eval()(val_inputs), model.eval()(val_inputs))


@pytest.mark.parametrize("state", STATES)
def test_a_stored_model_is_read_without_running_code(make, state):
    model, header = make(state)

    saved = torch.load(io.BytesIO(checkpoint.save(model, header)), weights_only=True)

    assert saved["header"] == dataclasses.asdict(header)


@pytest.mark.parametrize("state", STATES)
def test_a_model_handed_over_is_given_once_and_then_read_back(make, state):
    model, header = make(state)

    content = stored.hand_over(model, header)
    first, again = stored.open_model(content), stored.open_model(content)

    assert content == checkpoint.save(model, header)
    assert first == (model, header)
    assert again[0] is not model
    assert checkpoint.save(*again) == content


def test_no_model_is_taken_for_another(make):
    (float_model, float_header), (fused, fused_header) = make("float"), make("fused")
    first = stored.hand_over(float_model, float_header)
    stored.hand_over(fused, fused_header)

    opened, header = stored.open_model(first)

    assert opened is not float_model
    assert header == float_header


def test_the_kind_of_an_artifact_tells_the_models_state(make):
    kinds = [make(state)[1].kind for state in STATES]
    assert kinds[0] == "float-model"
    assert set(kinds) == {
        f"{state}-model" for state in ("float", "fused", "observed", "calibrated", "trainable", "int8")
    }


def test_an_int8_model_is_opened_without_searching_for_ranges(make, monkeypatch):
    content = checkpoint.save(*make("int8", "accurate"))

    def search(*_):
        raise AssertionError("An observer searched for ranges that come with the model.")

    monkeypatch.setattr(preparation.OBSERVERS["mse"], "calculate_qparams", search)
    assert stored.open_model(content)[1].state == "int8"
