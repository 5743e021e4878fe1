"""Using what was shipped: the likeliest classes of image files, from a bundle or a file of one."""

import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from quantlib.data import image_folder, loading
from quantlib.data.feeding import feed
from quantlib.errors import MachineError, ModelError
from quantlib.export import bundle, checksums
from quantlib.export.bundle import FileInfo, ModelInfo
from quantlib.files import write_atomically
from quantlib.progress import Progress, silent
from quantlib.runtimes import available, classifiers

_BATCH_SIZE = 32
_NUM_SHOWN = 5


@dataclass(frozen=True)
class Prediction:
    """What a model says about an image."""

    image: str
    """Path of the file."""
    classes: list[str]
    """The five likeliest, or all if there are fewer, the likeliest first."""
    probabilities: list[float]
    """Theirs, in [0, 1]."""


class Predictor:
    """A shipped model, ready for image files.

    Args:
        place: A bundle's folder, of which the first file is taken whose runtime is installed; or a file of it.

    Raises:
        ModelError: If there is no bundle, it is damaged, or a newer quantflow wrote it.
        MachineError: If its runtime is not installed, or this machine lacks its engine.
    """

    def __init__(self, place: Path) -> None:
        self.info, file, path = _find_file(place)
        checksums.verify(path)
        self._model = classifiers.open_model(path, file.runtime)
        self._path = path

    def predict(self, images: Sequence[str], progress: Progress = silent) -> Iterator[Prediction]:
        """What it says about each image, in order.

        Args:
            images: Paths of image files.
            progress: Called with (images done, images in all).

        Raises:
            DataError: If an image cannot be read.
            ModelError: If the file does not fit its document.
        """
        transform, classes = self.info.preprocessing.transform(), tuple(self.info.classes)
        split = image_folder.split_of_files([(path, 0) for path in images], classes)
        done = 0
        for pixels, _ in loading.batches(split, np.arange(len(split)), transform, 0, _BATCH_SIZE):
            scores = self._model(feed(torch.from_numpy(pixels), transform.normalization, self.info.interface))
            if scores.shape[1] != len(classes):
                raise ModelError(
                    f"{self._path} gives {scores.shape[1]} numbers per image, and its document names {len(classes)} "
                    "classes: they do not belong together. Export it again."
                )
            # As in evaluation: ties go to the lower class. Probabilities tie more often than logits.
            ranked = scores.sort(dim=1, descending=True, stable=True).indices[:, :_NUM_SHOWN]
            shares = (scores if self.info.interface.softmax else scores.softmax(dim=1)).gather(1, ranked)
            for share, rank in zip(shares.tolist(), ranked.tolist(), strict=True):
                yield Prediction(images[done], [classes[index] for index in rank], share)
                done += 1
            progress(done, len(images))


def _find_file(place: Path) -> tuple[ModelInfo, FileInfo, Path]:
    folder = place.parent if place.name == bundle.DOCUMENT else place
    if not folder.is_dir():
        info = bundle.read(place)
        return info, info.files[0], place
    if not (folder / bundle.DOCUMENT).exists():
        raise ModelError(
            f"{folder} is no bundle: it has no {bundle.DOCUMENT}. Give a folder that `quantflow export` wrote, or a "
            "file that a run wrote."
        )
    info = bundle.read(folder / bundle.DOCUMENT)
    file = next((file for file in info.files if available.is_installed(file.runtime)), None)
    if file is None:
        packages = " or ".join(dict.fromkeys(available.package_of(file.runtime) for file in info.files))
        raise MachineError(f"{folder} is for {packages}, which is not installed: pip install it.")
    return info, file, folder / file.name


def find_images(places: Iterable[Path]) -> list[str]:
    """The image files that are meant: files as they are, and of folders all images in them, in order.

    Raises:
        DataError: If a folder has no images.
    """
    return [path for place in places for path in (image_folder.find_images(place) if place.is_dir() else [str(place)])]


def write_parquet(predictions: Iterable[Prediction], path: Path) -> None:
    """Write predictions as a Parquet file with the columns image, class, probability, top5 and top5_probabilities."""
    rows = [
        {
            "image": each.image,
            "class": each.classes[0],
            "probability": each.probabilities[0],
            "top5": each.classes,
            "top5_probabilities": each.probabilities,
        }
        for each in predictions
    ]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    write_atomically(path, buffer.getvalue())
