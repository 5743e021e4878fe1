"""A run's inputs: found, checked, identified."""

import hashlib
import itertools
import json
import os
import shutil
import time
from dataclasses import replace
from typing import Any

import pytest
from PIL import Image

from quantlib import identity, inputs
from quantlib.data import datasets, loading
from quantlib.data.normalization import IMAGENET, Normalization
from quantlib.data.split import SplitInput, Subset
from quantlib.data.transforms import EvalTransform
from quantlib.errors import DataError, ModelError, RecipeError
from quantlib.inputs import find_inputs
from quantlib.recipe.schema import parse_recipe
from quantlib.store import codehash

module_numbers = itertools.count()


@pytest.fixture
def find(own_folder, tmp_path):
    """Finds the inputs of a recipe for `own_folder` (36 training and 18 validation images), with some keys changed."""

    def call(root=own_folder, cache="splits", **changes):
        return find_inputs(_recipe(root, **changes), tmp_path / cache)

    return call


def _recipe(root, **changes):
    tables: dict[str, Any] = {
        "name": "test",
        "model": {"weights": "train"},
        "data": {"format": "imagefolder", "root": None if root is None else str(root)},
        "evaluation": {"num_held_out": 10},
        "calibration": {"batch_size": 2, "num_batches": 13},
        "ptq": [{"name": "ptq"}],
        "qat": [{"name": "qat", "batch_size": 2, "batches_per_epoch": 13}],
    }
    for key, value in changes.items():
        tables[key] = tables[key] | value if isinstance(value, dict) else value
    return parse_recipe(tables)


# Checks


def test_a_recipe_that_asks_for_every_image_is_fine(find):
    found = find()

    assert (found.train.num_images, found.val.num_images) == (36, 18)
    assert found.train.classes == ("blue", "green", "red")
    assert found.val.num_classes == 3
    assert found.model.fingerprint == "train"


# The model's input


def test_the_models_input_is_torchvisions_usual_one_unless_the_recipe_or_the_weights_say_otherwise(find):
    assert find().transform == EvalTransform(resize=256, crop=(224, 224), normalization=IMAGENET)
    own = {"resize": 40, "crop": [32, 24], "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.25] * 3}
    assert find(data=own).transform == EvalTransform(
        resize=40, crop=(32, 24), interpolation="bicubic", normalization=Normalization((0.5,) * 3, (0.25,) * 3)
    )
    weights = {"architecture": "mobilenet_v2", "weights": "torchvision:IMAGENET1K_V2"}
    assert find(model=weights).transform == EvalTransform(resize=232, crop=(224, 224))
    assert find(model=weights, data={"resize": 300, "crop": 288}).transform == EvalTransform(
        resize=300, crop=(288, 288)
    )


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"resize": 32, "crop": 64}, r"data\.crop = \[64, 64\] does not fit into data\.resize = 32"),
        ({"crop": 300}, r"data\.crop = \[300, 300\] does not fit into data\.resize = 256"),
        (
            {"resize": [40, 60], "crop": [50, 50]},
            r"data\.crop = \[50, 50\] does not fit into data\.resize = \[40, 60\]",
        ),
    ],
)
def test_a_crop_larger_than_the_resized_image_is_refused(find, sizes, said):
    with pytest.raises(RecipeError, match=said):
        find(data=sizes)


def test_class_folders_that_differ_are_named(find, own_folder):
    (own_folder / "val" / "red").rename(own_folder / "val" / "rot")

    with pytest.raises(DataError, match="they differ in red, rot"):
        find()


def test_a_class_that_validation_lacks_is_named(find, own_folder):
    shutil.rmtree(own_folder / "val" / "red")

    with pytest.raises(DataError, match="train has 3 classes and val has 2; they differ in red"):
        find()


def test_a_number_of_classes_other_than_the_datas_is_refused(find):
    with pytest.raises(ModelError, match=r"num_classes = 10, and the data has 3 classes"):
        find(model={"arguments": {"num_classes": 10}})
    find(model={"arguments": {"num_classes": 3}})


def test_missing_weights_are_named(find, tmp_path):
    with pytest.raises(ModelError, match=r"No weights file .*w\.pth"):
        find(model={"weights": str(tmp_path / "w.pth")})


def test_weights_are_identified_by_their_bytes(find, tmp_path):
    paths = [tmp_path / name for name in ("a.pth", "b.pth", "c.pth")]
    for path, content in zip(paths, (b"same", b"same", b"other"), strict=True):
        path.write_bytes(content)

    same, again, other = (find(model={"weights": str(path)}).model.fingerprint for path in paths)

    assert same == again != other
    assert same == "0967115f2813a3541eaef77de9d9d5773f1c0c04314b0bbfe4ff3b3b1c55b5d5"  # echo -n same | sha256sum


def test_an_exported_model_is_identified_by_its_bytes_not_by_its_place(find, tmp_path):
    def found(name, content):
        (tmp_path / name).write_bytes(content)
        return find(model={"architecture": f"file:{tmp_path / name}", "weights": None}).model

    first, copied, other = found("a.pt2", b"a"), found("b.pt2", b"a"), found("a.pt2", b"b")

    assert first.architecture == "file:"
    assert first.code == copied.code != other.code
    assert copied.file == str(tmp_path / "b.pt2")


def test_a_missing_exported_model_is_named(find, tmp_path):
    with pytest.raises(ModelError, match=r"No file '.*m\.pt2': set model.architecture to 'file:' and its path"):
        find(model={"architecture": f"file:{tmp_path / 'm.pt2'}", "weights": None})


def test_torchvisions_weights_are_identified_by_name(find):
    assert find(model={"weights": "torchvision:DEFAULT"}).model.fingerprint == "torchvision:DEFAULT"


def test_more_than_half_held_out_is_refused(find):
    fewer = {"calibration": {"num_batches": 1}, "qat": [], "evaluation": {"num_held_out": 18}}
    find(**fewer)
    with pytest.raises(RecipeError, match=r"num_held_out = 19 of 36 training images.*Set it to 18 or less"):
        find(**fewer | {"evaluation": {"num_held_out": 19}})


def test_more_calibration_images_than_there_are_is_refused(find):
    with pytest.raises(RecipeError, match=r"14 batches of 2 = 28 images, and the training split has 26"):
        find(calibration={"num_batches": 14})
    start_float = {
        "name": "q",
        "start": "float",
        "freeze_observer_after_epoch": 0,
        "batch_size": 2,
        "batches_per_epoch": 1,
    }
    find(calibration={"num_batches": 14}, ptq=[], qat=[start_float])  # nothing is calibrated


def test_more_qat_images_than_there_are_is_refused(find):
    branches = [{"name": "a", "batch_size": 26}, {"name": "b", "batch_size": 3, "batches_per_epoch": 9}]

    with pytest.raises(RecipeError, match=r"qat\.1 asks for 27 images per epoch, and the training split has 26"):
        find(qat=branches)
    with pytest.raises(RecipeError, match=r"qat\.0 asks for 27 images"):
        find(qat=[{"name": "a", "batch_size": 27}])


def test_a_missing_dataset_is_named(find, tmp_path):
    with pytest.raises(DataError, match=r"No folder .*nowhere"):
        find(root=tmp_path / "nowhere")


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_file_where_a_split_should_be_is_named(find, own_folder, split):
    shutil.rmtree(own_folder / split)
    (own_folder / split).touch()

    with pytest.raises(DataError, match=f"No folder .*{split}"):
        find()


@pytest.mark.parametrize("name", ["lost.jpg", "lost.txt"])
def test_a_link_that_leads_nowhere_is_named(find, own_folder, name):
    (own_folder / "train" / "red" / name).symlink_to("nowhere")

    with pytest.raises(DataError, match=rf"red/{name} cannot be read"):
        find()


# Selections


def test_held_out_and_training_images_share_none_and_are_all(find):
    found = find()
    held_out, training = (loading.select(selection)[1].tolist() for selection in (found.held_out, found.training))

    assert len(held_out) == 10
    assert sorted(held_out + training) == list(range(36))
    assert held_out != sorted(held_out)  # from all classes, not just the first folder's


def test_choosing_on_validation_holds_nothing_back(find):
    found = find(evaluation={"select_on": "validation"})

    assert (found.held_out.start, found.held_out.stop) == (0, 0)
    assert found.held_out.parts(10) == ()
    assert (found.training.start, found.training.stop) == (0, 36)


@pytest.mark.parametrize("max_images", [None, 18, 100])
def test_validation_is_every_image_in_the_datasets_order(find, max_images):
    found = find(evaluation={"max_images": max_images})

    assert found.validation.split.name == "val"
    assert loading.select(found.validation)[1].tolist() == list(range(18))


def test_part_of_the_validation_images_is_drawn_from_all_classes_not_just_the_first(
    find,
):
    split, numbers = loading.select(find(evaluation={"max_images": 9}).validation)

    assert len(set(numbers.tolist())) == 9
    assert set(split.labels[numbers]) == set(split.labels)


def test_parts_are_the_selection_in_order():
    split = SplitInput("digits", "train", None, "", 100, ("a",))
    selection = Subset(split, 3, 10, 45)

    parts = selection.parts(20)

    assert [(part.start, part.stop) for part in parts] == [(10, 30), (30, 45)]
    assert all((part.split, part.seed) == (split, 3) for part in parts)
    assert selection.parts(35) == (selection,)
    assert replace(selection, stop=10).parts(20) == ()


# Fingerprints


def _fingerprints(found):
    return found.train.fingerprint, found.val.fingerprint


def test_a_changed_image_changes_its_splits_fingerprint_alone(find, own_folder):
    train, val = _fingerprints(find())
    Image.new("RGB", (40, 40)).save(own_folder / "val" / "red" / "01.png")

    assert find().train.fingerprint == train
    assert find().val.fingerprint != val


def test_a_changed_byte_in_a_file_of_the_same_size_changes_the_fingerprint(find, own_folder):
    before = find().val.fingerprint
    path = own_folder / "val" / "red" / "01.png"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)

    assert find().val.fingerprint != before


@pytest.mark.parametrize("change", ["rename", "move to another class", "remove", "add"])
def test_which_images_exist_and_where_decides_the_fingerprint(find, own_folder, change):
    before = find().train.fingerprint
    path = own_folder / "train" / "red" / "01.png"
    match change:
        case "rename":
            path.rename(path.with_name("99.png"))
        case "move to another class":
            path.rename(own_folder / "train" / "blue" / "99.png")
        case "remove":
            path.unlink()
        case "add":
            shutil.copy(path, path.with_name("99.png"))
    fewer = {"calibration": {"num_batches": 1}, "qat": []}

    assert find(**fewer).train.fingerprint != before


@pytest.mark.parametrize("change", ["size", "time", "name", "folder", "link", "remove", "add"])
def test_each_kind_of_change_to_a_file_is_noticed_in_its_split_alone(own_folder, change):
    recipe = _recipe(own_folder).data
    before, val = (identity._look(recipe, name, "") for name in ("train", "val"))
    path = own_folder / "train" / "red" / "01.png"
    status = path.stat()
    match change:
        case "size":
            path.write_bytes(path.read_bytes() + b"0")
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        case "time":
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        case "name":
            path.rename(path.with_name("99.png"))
        case "folder":
            path.parent.rename(path.parents[1] / "rouge")
        case "link":  # To a file of another time.
            path.unlink()
            path.symlink_to(own_folder / "val" / "red" / "01.png")
        case "remove":
            path.unlink()
        case "add":
            (path.parent / "deeper").mkdir()
            shutil.copy2(path, path.parent / "deeper" / "01.png")

    assert identity._look(recipe, "train", "") != before
    assert identity._look(recipe, "val", "") == val


def test_a_file_whose_size_and_time_are_restored_is_not_read_again(find, own_folder):
    before = find()
    path = own_folder / "val" / "red" / "01.png"
    content, status = bytearray(path.read_bytes()), path.stat()
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    assert find() == before
    assert find(cache="empty") != before


def test_files_are_identified_in_the_order_of_their_paths(own_folder):
    red = own_folder / "train" / "red"
    for name in ("a/1.png", "a-b/1.png", "a0.png", "A.png", "a-.png", "a/b/1.png", "a/b.png", "ä.png"):
        (red / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(red / "01.png", red / name)
    paths: list[str] = []
    identity._look(_recipe(own_folder).data, "train", "", paths)

    assert paths == sorted(str(path) for path in (own_folder / "train").rglob("*") if path.is_file())


def test_the_fingerprint_is_that_of_the_relative_paths_and_contents(find, own_folder):
    files = sorted((path for path in (own_folder / "val").rglob("*") if path.is_file()), key=str)
    content = hashlib.sha256(repr(("imagefolder", "", "")).encode())
    for file in files:
        content.update(f"{file.relative_to(own_folder)}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())

    assert find().val.fingerprint == content.hexdigest()


def test_more_files_than_a_thread_takes_at_a_time_keep_their_order(tmp_path):
    paths = [tmp_path / f"{number:04}" for number in range(3 * identity._CHUNK + 1)]
    for path in paths:
        path.write_text(path.name)

    assert list(identity._hash_files(list(map(str, paths)))) == [
        (str(path), hashlib.sha256(path.name.encode()).hexdigest()) for path in paths
    ]


def test_a_name_that_is_not_utf_8_is_refused(find, own_folder):
    shutil.copy(own_folder / "val" / "red" / "01.png", os.fsencode(own_folder / "val" / "red") + b"/\xff.png")

    with pytest.raises(DataError, match=r"red/\\udcff.png' has a name that is not UTF-8. Rename it."):
        find()


def test_a_copy_elsewhere_has_the_same_fingerprint(find, own_folder, tmp_path):
    copy = shutil.copytree(own_folder, tmp_path / "some" / "other place")

    assert _fingerprints(find(root=copy)) == _fingerprints(find())


def test_a_touched_file_keeps_the_fingerprint(find, own_folder):
    before = _fingerprints(find())
    for path in own_folder.glob("*/*/*"):
        os.utime(path, (time.time() + 100, time.time() + 100))

    assert _fingerprints(find()) == before


def test_files_are_read_once(find, monkeypatch):
    first = find()

    def read(path, *_):
        raise AssertionError(f"{path} was read again")

    monkeypatch.setattr(identity, "_hash_file", read)
    monkeypatch.setattr(datasets, "open_split", read)

    assert find() == first
    with pytest.raises(AssertionError, match="read again"):
        find(cache="empty")


@pytest.mark.parametrize("damage", [b"", b"[]", b"{}", b'{"classes": 3}', b'{"classes": [], "more": 1}'])
def test_a_damaged_note_is_made_again(find, tmp_path, damage):
    first = find()
    notes = list((tmp_path / "splits").iterdir())
    for note in notes:
        note.write_bytes(damage)

    assert find() == first
    assert all(note.read_bytes() != damage for note in notes)


def test_progress_counts_the_files_of_each_split(own_folder, tmp_path):
    calls: list[tuple[int, int]] = []
    find_inputs(_recipe(own_folder), tmp_path / "splits", lambda *call: calls.append(call))

    assert calls == [(36, 36), (18, 18)]


def test_digits_are_identified_by_the_library_that_carries_them(tmp_path, monkeypatch):
    recipe = _recipe(None, data={"format": "digits"})
    before = _fingerprints(find_inputs(recipe, tmp_path))
    monkeypatch.setattr(identity, "_library", lambda _: "99.0")

    after = _fingerprints(find_inputs(recipe, tmp_path))

    assert len({*before, *after}) == 4


def test_a_root_does_not_affect_the_digits(own_folder, tmp_path):
    with_root = find_inputs(_recipe(own_folder, data={"format": "digits"}), tmp_path)

    assert _fingerprints(with_root) == _fingerprints(find_inputs(_recipe(None, data={"format": "digits"}), tmp_path))


def test_files_that_opening_unpacks_are_part_of_the_fingerprint(own_folder, tmp_path, monkeypatch):
    open_split, kept = datasets.open_split, own_folder.rename(tmp_path / "archive")

    def unpack(data_format, root, split):
        if not own_folder.exists():
            shutil.copytree(kept, own_folder)
        return open_split(data_format, root, split)

    monkeypatch.setattr(datasets, "open_split", unpack)

    first = find_inputs(_recipe(own_folder), tmp_path / "splits")

    assert _fingerprints(find_inputs(_recipe(own_folder), tmp_path / "splits")) == _fingerprints(first)
    assert _fingerprints(find_inputs(_recipe(kept), tmp_path / "splits")) == _fingerprints(first)


# A user's own code


@pytest.fixture
def users_module(tmp_path, monkeypatch):
    """Writes an importable module, always the same one, and returns its name."""
    folder = tmp_path / "users"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    name = f"users_input_{next(module_numbers)}"

    def write(source):
        (folder / f"{name}.py").write_text(source)
        codehash.module_hashes.cache_clear()  # like a new process
        return name

    return write


def test_a_users_architecture_is_identified_by_its_code(find, users_module):
    first, same, other = (
        find(model={"architecture": f"{users_module(source)}:net"}).model.code
        for source in ("def net(): return 1", "def net(): return 1  # a comment", "def net(): return 2")
    )

    assert first == same != other
    assert find().model.code == ""


def test_a_users_dataset_is_identified_by_its_code_and_its_files(users_module, own_folder, tmp_path):
    source = (
        "from torchvision.datasets import ImageFolder\n"
        "def dataset(root, split):\n"
        "    return ImageFolder(f'{root}/{split}')\n"
    )

    def find(text):
        recipe = _recipe(own_folder, data={"format": f"{users_module(text)}:dataset"})
        return find_inputs(recipe, tmp_path / "splits").val.fingerprint

    first, same, other = find(source), find(source + "# the end"), find(source.replace("def ", "LIMIT = 1\ndef "))
    (own_folder / "val" / "red" / "01.png").write_bytes(b"other")

    assert first == same
    assert len({first, other, find(source)}) == 3


def test_users_code_that_is_not_there_is_named(find):
    with pytest.raises(RecipeError, match=r"model\.architecture = 'no_such_module:net' cannot be imported"):
        find(model={"architecture": "no_such_module:net"})
    with pytest.raises(RecipeError, match=r"data\.format = 'no_such_module:data' cannot be imported"):
        find(data={"format": "no_such_module:data"})


@pytest.mark.parametrize("package", ["flows", "tasks", "quantlib", "recipes"])
def test_users_code_under_the_name_of_a_package_of_ours_is_refused(find, package):
    with pytest.raises(
        RecipeError, match=rf"'{package}.net', but '{package}' is a package of quantflow itself: rename"
    ):
        find(model={"architecture": f"{package}.net:build"})
    with pytest.raises(RecipeError, match=rf"data.format names the module '{package}'.* rename your module"):
        find(data={"format": f"{package}:images"})


def test_architecture_arguments_are_identified_in_any_order(find):
    first, second = (
        find(model={"arguments": arguments}).model.arguments
        for arguments in ({"width_mult": 0.5, "num_classes": 3}, {"num_classes": 3, "width_mult": 0.5})
    )

    assert first == second


def test_skipped_files_are_reported(find, own_folder):
    assert find().remarks == []
    folder = next((own_folder / "train").iterdir())
    for name in ("a.heic", "b.txt"):
        (folder / name).write_bytes(b"")
    for _ in range(2):  # The second time from the note.
        assert find().remarks == [
            "2 files in the train split's folders are not images, or of a kind that is not read: they were skipped."
        ]


def test_an_altered_note_is_made_again(find, tmp_path):
    right = find()
    for note in (tmp_path / "splits").iterdir():
        note.write_text(note.read_text().replace('"num_images": ', '"num_images": 1'))
    assert find() == right
    for note in (tmp_path / "splits").iterdir():
        fields = json.loads(note.read_text())
        del fields["sha256"]
        note.write_text(json.dumps(fields | {"num_images": 7}))
    assert find() == right


def test_a_single_training_image_is_refused(own_folder):
    with pytest.raises(RecipeError, match="has 1 image, and at least two are needed"):
        inputs.check_train_size(_recipe(own_folder), 1)


def test_a_misspelt_layer_is_found_before_any_stage(find):
    with pytest.raises(ModelError, match=r"names 'features.1.cnov.0.0'.*did you mean 'features.1.conv.0.0'"):
        find(ptq=[{"name": "p", "float_layers": ["features.1.cnov.0.0"]}])
    assert find(ptq=[{"name": "p", "float_layers": ["features.1.conv.0.0"]}])
