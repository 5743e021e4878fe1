"""A first recipe for a folder of images and weights: it can be run, or an error says what is missing."""

import shutil
from pathlib import Path

import exported
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import models

from quantlib import inputs
from quantlib.errors import DataError, ModelError, RecipeError
from quantlib.models import registry
from quantlib.new_recipe import write_recipe
from quantlib.recipe.file import load_recipe


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The working folder, with a copy of the image folder as photos/."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def photos(place, image_folder):
    """train/CLASS/IMAGE and val/CLASS/IMAGE, free to change; relative to the working folder."""
    shutil.copytree(image_folder, place / "photos")
    return Path("photos")


def draft(folder, weights=None, to="recipe.toml"):
    """The recipe that is written, its text, and what a run would find by it."""
    write_recipe(folder, None if weights is None else Path(weights), Path(to))
    recipe = load_recipe(Path(to))
    return recipe, Path(to).read_text(), inputs.find_inputs(recipe, Path("hashes").absolute())


def test_train_and_val_become_an_image_folder_with_a_reason_for_each_value(photos):
    recipe, text, found = draft(photos)
    assert recipe.data.format == "imagefolder"
    assert recipe.data.root == str(photos.absolute())
    assert 'root = "photos"' in text
    assert (recipe.model.architecture, recipe.model.weights) == ("mobilenet_v2", "train")
    assert recipe.model.arguments == {"num_classes": 3}
    assert (found.train.num_images, found.val.num_images) == (36, 18)
    # Noise of 34 to 59 pixels: nothing is enlarged.
    assert (recipe.data.crop, recipe.data.resize) == (32, 37)
    assert (recipe.calibration.batch_size, recipe.calibration.num_batches) == (30, 1)
    assert "# 36 training and 18 validation images of 3 classes" in text
    for key in ("architecture", "arguments", "weights", "format", "resize", "batch_size", "max_top1_drop"):
        lines = text.splitlines()
        number = next(number for number, line in enumerate(lines) if line.startswith(f"{key} ="))
        assert any(line.startswith("#") for line in lines[max(0, number - 3) : number]), key


def test_train_and_test_are_measured_on_test(photos):
    (photos / "val").rename(photos / "test")
    recipe, text, found = draft(photos)
    assert recipe.data.format == "imagefolder"
    assert "accuracy is measured on test/" in text
    assert found.val.num_images == 18


def test_flat_class_folders_are_split(photos):
    recipe, text, found = draft(photos / "train")
    assert recipe.data.format == "classfolders"
    assert "a fifth of each class is kept for validation" in text
    assert (found.train.num_images, found.val.num_images) == (30, 6)
    changed = next((photos / "train" / "red").iterdir())
    Image.new("RGB", (40, 40)).save(changed)
    again = inputs.find_inputs(recipe, Path("hashes").absolute())
    assert again.train.fingerprint != found.train.fingerprint


def test_a_folder_with_train_alone_is_split(photos):
    shutil.rmtree(photos / "val")
    recipe, _, found = draft(photos)
    assert (recipe.data.format, recipe.data.root) == ("classfolders", str((photos / "train").absolute()))
    assert found.val.num_images == 6


def imagenet_names(photos):
    for split in ("train", "val"):
        for number, name in enumerate(("blue", "green", "red")):
            (photos / split / name).rename(photos / split / f"n0144{number:04}")


def test_folders_of_imagenet_are_an_image_folder(photos):
    imagenet_names(photos)
    recipe, _, found = draft(photos)
    assert recipe.data.format == "imagefolder"
    assert found.val.classes == ("n01440000", "n01440001", "n01440002")


def test_validation_images_of_unknown_class_are_an_error(photos):
    imagenet_names(photos)
    for number, path in enumerate(sorted((photos / "val").rglob("*.*g"))):
        path.rename(photos / "val" / f"ILSVRC2012_val_{number:08}{path.suffix}")
    for folder in (photos / "val").iterdir():
        if folder.is_dir():
            folder.rmdir()
    with pytest.raises(
        DataError, match=r"val has no classes: it must hold one folder per class.* class of the 18 images"
    ):
        draft(photos)
    assert not Path("recipe.toml").exists()


def test_imagenet_with_its_devkit_is_read_as_torchvision_keeps_it(photos):
    (photos / "meta.bin").touch()
    with pytest.raises(DataError, match="is not torchvision's ImageNet"):
        draft(photos)


def litter(folder):
    """Files that are no images."""
    for place in (folder, folder / "train", folder / "train" / "red", folder / "val"):
        (place / ".DS_Store").write_bytes(b"\0")
        (place / "README").write_text("read me")
    (folder / "train" / "red" / "notes.txt").write_text("none")
    (folder / ".git").mkdir()
    (folder / "train" / ".ipynb_checkpoints").mkdir()


def test_stray_files_do_not_matter(photos):
    litter(photos)
    _, _, found = draft(photos)
    assert found.train.classes == ("blue", "green", "red")
    assert found.train.num_images == 36


def test_an_empty_class_folder_is_named(photos):
    litter(photos)
    (photos / "train" / "mauve").mkdir()
    with pytest.raises(DataError, match="a class without images: mauve"):
        draft(photos)


def only_val(photos):
    shutil.rmtree(photos / "train")


def other_classes(photos):
    (photos / "val" / "red").rename(photos / "val" / "rose")


def above(photos):
    shutil.move(photos, "inner")
    photos.mkdir()
    shutil.move("inner", photos / "data")


def no_folder(photos):
    shutil.rmtree(photos)


def no_image(photos):
    path = min((photos / "train" / "blue").iterdir())
    path.write_text("not a picture")


def few_images(photos):
    for split in ("train", "val"):
        shutil.rmtree(photos / split)
    for name in ("cat", "dog"):
        (photos / name).mkdir()
        Image.new("RGB", (40, 40)).save(photos / name / "one.png")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (only_val, "has val/ and no train/"),
        (other_classes, "they differ in red, rose"),
        (above, r"has one class, data: .*perhaps it is photos/data"),
        (no_folder, "No folder photos: give the folder that holds your images"),
        (no_image, r"blue/00\.jpg cannot be decoded"),
        (few_images, "has one image: a class needs at least two"),
    ],
)
def test_a_folder_that_cannot_be_used_is_an_error_that_says_why(spoil, message, photos):
    spoil(photos)
    with pytest.raises(DataError, match=message):
        draft(photos)
    assert not Path("recipe.toml").exists()


def save(model, name="weights.pth"):
    torch.save(model.state_dict(), name)
    return name


def enlarge(folder):
    """Make every image large enough for torchvision's own weights."""
    for path in folder.rglob("*.*g"):
        with Image.open(path) as image:
            image.resize((230, 240)).save(path)


def test_weights_get_the_nearest_architecture_and_its_preprocessing(photos):
    enlarge(photos)
    recipe, text, found = draft(photos, save(models.efficientnet_b0(num_classes=3)))
    assert recipe.model.architecture == "torchvision:efficientnet_b0"
    assert 'weights = "weights.pth"' in text
    assert (recipe.data.resize, recipe.data.crop, recipe.data.interpolation) == (256, 224, "bicubic")
    assert "As for torchvision's own weights of efficientnet_b0" in text
    model, _ = registry.from_input(found.model, 3, (3, 224, 224), 0)
    registry.check_logits(model, 3, (3, 224, 224))


def test_images_smaller_than_the_architectures_own_weights_take_are_not_enlarged_unless_it_takes_one_size(photos):
    recipe, text, _ = draft(photos, save(models.resnet18(num_classes=3)))
    assert (recipe.data.resize, recipe.data.crop) == (37, 32)
    assert "smaller than the 224 pixels of torchvision's own weights; set what yours were trained with" in text
    recipe, _, _ = draft(photos, save(models.vit_b_32(num_classes=3)), to="vit.toml")
    assert (recipe.data.resize, recipe.data.crop) == (256, 224)


def test_weights_of_mobilenet_v2_become_the_registered_architecture(photos):
    assert draft(photos, save(models.mobilenet_v2(num_classes=3)))[0].model.architecture == "mobilenet_v2"


def test_an_exported_model_gives_the_size_of_its_images(photos):
    net = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(), nn.Linear(8 * 10 * 12, 3))
    exported.write(net, "net.pt2", images=torch.zeros(2, 3, 40, 48))
    recipe, text, _ = draft(photos, "net.pt2")
    assert 'architecture = "file:net.pt2"' in text
    assert recipe.model.weights is None
    assert (recipe.data.resize, recipe.data.crop) == ((40, 48), (40, 48))


def test_a_square_exported_model_gets_the_usual_margin(photos):
    exported.write(nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(), nn.Linear(512, 3)), "net.pt2")
    recipe, _, _ = draft(photos, "net.pt2")
    assert (recipe.data.resize, recipe.data.crop) == (37, 32)


def unlike(_):
    return save(nn.Linear(3, 4))


def of_other_classes(_):
    return save(models.mobilenet_v2(num_classes=7))


def exported_for_other_classes(_):
    return exported.write(nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(), nn.Linear(512, 7)), "net.pt2")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda _: "none.pth", "No weights file 'none.pth'"),
        (unlike, r"weights of no classifier of torchvision: export the model"),
        (of_other_classes, r"photos has 3 classes: are these weights trained on them"),
        (exported_for_other_classes, r"gives \[1, 7\] for one image, .*photos has 3 classes"),
    ],
)
def test_weights_that_do_not_fit_are_an_error_that_says_why(make, message, photos, place):
    with pytest.raises(ModelError, match=message):
        draft(photos, make(place))
    assert not Path("recipe.toml").exists()


def test_an_existing_file_is_never_overwritten(photos):
    Path("recipe.toml").write_text("mine")
    with pytest.raises(RecipeError, match=r"recipe\.toml exists, and nothing is overwritten"):
        draft(photos)
    assert Path("recipe.toml").read_text() == "mine"


def test_paths_are_relative_to_the_recipes_folder(photos):
    Path("recipes").mkdir()
    recipe, text, _ = draft(photos, to="recipes/mine.toml")
    assert 'root = "../photos"' in text
    assert Path(recipe.data.root).resolve() == photos.resolve()


def test_an_absolute_folder_stays_absolute(photos):
    _, text, _ = draft(photos.absolute())
    assert f'root = "{photos.absolute()}"' in text


def test_names_cannot_end_a_comment_or_a_string(photos):
    for split in ("train", "val"):
        (photos / split / "red").rename(photos / split / 'r\nevil = "1"')
    odd = photos.rename('odd "quoted" \\ ü')
    recipe, text, _ = draft(odd)
    assert "evil" in text
    assert recipe.name == "odd-quoted-"
    assert Path(recipe.data.root).name == odd.name


@pytest.mark.parametrize(
    ("side", "resize", "crop"), [(28, 32, 32), (64, 64, 64), (100, 100, 96), (230, 230, 224), (900, 256, 224)]
)
def test_the_size_without_weights_is_that_of_the_images_up_to_imagenets(side, resize, crop, place):
    for name in ("cat", "dog"):
        (place / "pets" / name).mkdir(parents=True)
        for number in range(6):
            Image.new("RGB", (side, side + 50)).save(place / "pets" / name / f"{number}.png")
    recipe, text, _ = draft(Path("pets"))
    assert (recipe.data.resize, recipe.data.crop) == (resize, crop)
    assert f"typically {side + 50} x {side} pixels" in text
