"""How images are prepared for published weights."""

import pytest
from torchvision import models
from torchvision.models import get_model_weights, list_models

from quantlib.data.normalization import IMAGENET
from quantlib.errors import ModelError
from quantlib.models.preprocessing import of_weights


def test_weights_that_say_nothing_get_torchvisions_usual_preprocessing():
    for weights in ("train", "weights.pth"):
        found = of_weights("mobilenet_v2", weights)
        assert (found.resize, found.crop, found.interpolation) == (256, (224, 224), "bilinear")
        assert found.normalization == IMAGENET


@pytest.mark.parametrize("name", ["resnet50", "efficientnet_b1", "convnext_tiny", "vit_b_16", "swin_t"])
def test_torchvisions_weights_bring_their_own(name):
    for member in get_model_weights(name):
        found, preset = of_weights(name, f"torchvision:{member.name}"), member.transforms()
        assert [found.resize] == preset.resize_size
        assert list(found.crop) == preset.crop_size * 2
        assert found.interpolation == preset.interpolation.value
        assert (list(found.normalization.mean), list(found.normalization.std)) == (preset.mean, preset.std)


def test_every_classifier_of_torchvision_has_one():
    names = list_models(module=models)
    assert len(names) > 70
    for name in names:
        for member in get_model_weights(name):
            found = of_weights(name, f"torchvision:{member.name}")
            assert 32 <= found.crop[0] <= found.resize <= 600


def test_unknown_weights_are_refused_with_those_that_are_known():
    with pytest.raises(ModelError, match="IMAGENET1K_V1"):
        of_weights("resnet18", "torchvision:IMAGENET")
