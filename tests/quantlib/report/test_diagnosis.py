"""Why a variant loses accuracy, from rows alone."""

from dataclasses import asdict, replace

import pytest
from rows import layer_row, variant_row

from quantlib.measure.sensitivity import LayerSums
from quantlib.report import diagnosis
from quantlib.report.results import Report


def _sums(layer, **changes):
    values = {"type": "Conv2d", "signal": 100.0, "noise": 1.0, "num_values": 1000, "num_clipped": 10}
    values |= {"num_images": 10, "num_correct_only": 9, "num_correct_all_but": 8, "divergence_only": 0.5}
    values |= {"num_correct_float": 9, "num_correct_int8": 7, "activation_min": 0.0, "activation_max": 1.0}
    return asdict(LayerSums(**{"layer": layer, **values, **changes}))


def _layer(name, divergence, **changes):
    return layer_row(name, divergence_only=divergence, saturation=0.0, **changes)


def _variant(name, **changes):
    tried = {"observer": "mse", "weights": "per_channel", "equalized": True, "bias_corrected": True}
    return variant_row(name, **{"top1_drop": 0.25} | tried | changes)


def _diagnose(variant, *layers):
    variants = (_variant("float", method="float"), variant)
    run = Report(run_id="run", variants=variants, epochs=(), latency=(), stages=(), layers=layers)
    return diagnosis.diagnose(run)


def test_parts_of_the_images_become_one_row():
    parts = [[_sums("x", num_images=10)], [_sums("x", num_images=30, num_correct_only=27, noise=0.0, num_clipped=0)]]
    (row,) = diagnosis.layer_rows("a", "validation", parts)
    assert (row.num_images, row.top1_only, row.top1_all_but) == (40, 0.9, 0.4)
    assert (row.top1_float, row.top1_int8) == (0.45, 0.35)
    assert row.sqnr_db == pytest.approx(23.0103)  # 10 log10(200 / 1)
    assert row.saturation == 0.005
    assert row.divergence_only == 0.025
    assert (row.variant, row.measured_on) == ("a", "validation")


def test_an_output_that_is_not_quantized_has_no_ratio():
    (row,) = diagnosis.layer_rows("a", "held_out", [[_sums("x", signal=0.0, noise=0.0, num_values=0, num_clipped=0)]])
    assert (row.sqnr_db, row.saturation) == (None, None)


def test_the_three_layers_that_cost_most_come_first_and_only_the_variants_own():
    layers = [_layer(name, cost) for name, cost in (("w", 0.1), ("x", 0.4), ("y", 0.2), ("z", 0.3))]
    (found,) = _diagnose(_variant("a"), *layers, _layer("other", 9.0, variant="b"))
    assert [row.layer for row in found.worst] == ["x", "z", "y"]


def test_float_and_variants_of_which_nothing_is_known_have_no_diagnosis():
    assert _diagnose(_variant("a")) == []
    assert len(_diagnose(_variant("a", top1_simulated=0.5))) == 1


@pytest.mark.parametrize(
    ("options", "first"),
    [
        ({"equalized": False, "weights": "per_tensor"}, "equalize = true"),
        ({"observer": "minmax"}, 'observer = "mse"'),
        ({"bias_corrected": False}, "bias_correction = true"),
        ({}, "a [[qat]] branch"),
        ({"method": "qat"}, 'float_layers = ["x"]'),
    ],
)
def test_advice_is_what_the_variant_has_not_tried_the_cheapest_first(options, first):
    (found,) = _diagnose(_variant("a", **options), _layer("x", 0.1))
    assert found.advice[0].startswith(first)
    assert len(found.advice) <= 3


def test_there_is_nothing_to_try_where_nothing_was_lost():
    (found,) = _diagnose(_variant("a", top1_drop=-0.01), _layer("x", 0.1))
    assert (len(found.worst), found.advice) == (1, ())


def test_ranges_that_cut_off_much_are_to_be_widened():
    (found,) = _diagnose(_variant("a"), replace(_layer("x", 0.1), saturation=0.01))
    assert found.advice[0].startswith('observer = "minmax"')
    (found,) = _diagnose(_variant("a", observer="minmax"), replace(_layer("x", 0.1), saturation=0.01))
    assert found.advice[0].startswith("more images in [calibration]")
