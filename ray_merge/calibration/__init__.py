"""A task's inputs: from files of texts, token ids or images to batches that a model takes."""

from ray_merge.calibration.batches import Batch, Calibrated, load_batches
from ray_merge.calibration.files import data_identity
from ray_merge.calibration.labels import labels_of

__all__ = ["Batch", "Calibrated", "data_identity", "labels_of", "load_batches"]
