"""What a model said about each image, and the accuracy that follows from it."""

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


@dataclass(frozen=True)
class Predictions:
    """A model's answers, image by image.

    Attributes:
        labels: [N], int64 class indices.
        top5: [N, k], int64: the k = min(5, num_classes) likeliest classes, likeliest first.
        loss: [N], float32 cross-entropy in nats.
    """

    labels: np.ndarray
    top5: np.ndarray
    loss: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int) -> "Predictions":
        """The answers for the first images."""
        return Predictions(self.labels[:count], self.top5[:count], self.loss[:count])

    @property
    def top1_correct(self) -> np.ndarray:
        """[N], bool: whether the likeliest class is the label."""
        return np.asarray(self.top5[:, 0] == self.labels)

    @property
    def top1(self) -> float:
        """Fraction of images whose likeliest class is the label."""
        return float(np.mean(self.top1_correct))

    @property
    def top5_accuracy(self) -> float:
        """Fraction of images whose label is among the five likeliest classes."""
        return float(np.mean((self.top5 == self.labels[:, None]).any(axis=1)))

    @property
    def mean_loss(self) -> float:
        """Mean cross-entropy in nats."""
        return float(np.mean(self.loss, dtype=np.float64))


def concatenate(parts: Sequence[Predictions]) -> Predictions:
    """The predictions of consecutive shards as one.

    Raises:
        ValueError: If there are no parts.
    """
    return Predictions(
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part.top5 for part in parts]),
        np.concatenate([part.loss for part in parts]),
    )


def save(predictions: Predictions) -> bytes:
    """The predictions as a Parquet file with the columns label, top5 and loss."""
    table = pa.table(
        {
            "label": pa.array(predictions.labels, pa.int64()),
            "top5": pa.FixedSizeListArray.from_arrays(
                pa.array(predictions.top5.ravel(), pa.int64()), predictions.top5.shape[1]
            ),
            "loss": pa.array(predictions.loss, pa.float32()),
        }
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def load(content: bytes) -> Predictions:
    """What `save` wrote."""
    table = pq.read_table(io.BytesIO(content))
    top5 = table["top5"].combine_chunks()
    return Predictions(
        labels=table["label"].to_numpy(),
        top5=top5.flatten().to_numpy().reshape(len(table), top5.type.list_size),
        loss=table["loss"].to_numpy(),
    )


def load_shards(contents: Iterable[bytes]) -> Predictions:
    """The predictions of consecutive shards, each as `save` wrote it, as one.

    Raises:
        ValueError: If there are no shards.
    """
    return concatenate([load(content) for content in contents])
