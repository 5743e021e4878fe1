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


@pytest.mark.parametrize(
    ("architecture", "tag", "resize", "crop", "interpolation"),
    [
        # Trained at 224; the publisher tests at 288, which is 95% of the resized image.
        ("convnext_atto", "d2_in1k", 303, 288, "bicubic"),
        # Without figures for testing, those of training are meant.
        ("vgg11", "tv_in1k", 256, 224, "bilinear"),
    ],
)
def test_weights_of_timm_bring_their_own(architecture, tag, resize, crop, interpolation):
    pytest.importorskip("timm", reason="the extra quantflow[timm] is not installed")
    found = of_weights(f"timm:{architecture}", f"timm:{tag}")
    assert (found.resize, found.crop, found.interpolation) == (resize, (crop, crop), interpolation)


@pytest.mark.parametrize(
    "name",
    [
        "convnext_atto.d2_in1k",
        "resnet10t.c3_in1k",
        "mobilenetv3_small_100.lamb_in1k",
        "deit_tiny_patch16_224.fb_in1k",
        "convnext_base.fb_in22k_ft_in1k_384",  # Without regard to the image's proportions.
    ],
)
def test_weights_of_timm_are_prepared_for_as_in_timms_own_evaluation(name):
    timm = pytest.importorskip("timm", reason="the extra quantflow[timm] is not installed")
    published = timm.models.get_pretrained_cfg(name).to_dict()
    # As timm's validate.py calls it.
    theirs = timm.data.resolve_data_config({}, pretrained_cfg=published, use_test_size=True)
    architecture, _, tag = name.partition(".")
    found = of_weights(f"timm:{architecture}", f"timm:{tag}")

    _, *crop = theirs["input_size"]
    assert list(found.crop) == crop
    resizing, *_ = timm.data.create_transform(**theirs).transforms
    assert found.resize == (resizing.size if isinstance(resizing.size, int) else tuple(resizing.size))
    assert found.interpolation == theirs["interpolation"]
    assert (found.normalization.mean, found.normalization.std) == (theirs["mean"], theirs["std"])


def test_weights_of_timm_that_take_a_border_are_refused():
    timm = pytest.importorskip("timm", reason="the extra quantflow[timm] is not installed")
    bordered = next(name for name in timm.list_pretrained() if timm.get_pretrained_cfg(name).crop_mode == "border")
    architecture, _, tag = bordered.partition(".")
    with pytest.raises(ModelError, match="a border around them, which quantflow does not do: take other weights"):
        of_weights(f"timm:{architecture}", f"timm:{tag}")


def test_unknown_weights_of_timm_are_refused_with_those_that_are_known():
    pytest.importorskip("timm", reason="the extra quantflow[timm] is not installed")
    with pytest.raises(ModelError, match="d2_in1k"):
        of_weights("timm:convnext_atto", "timm:in1k")
