"""What the HDF5 file of a run has, and what its parts are called.

/epochs/{epoch, train_nll, …}  one row an evaluation: EPOCH_FIGURES
/steps/{loss, …}               one row a step: docs/reference/runfile.md
/parameters/{conv1.weight, …}  by name and in shape, at the last evaluation; at the end /ema_parameters and
                               /tail_parameters, the averages, too
/status                        running, finished, or what went wrong
attributes                     the configuration, the network, versions, the process that writes it
"""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from qnewton_mpi.data.parts import VALIDATION

Parameters = dict[str, NDArray[Any]]

ITERATES = ("", "ema_", "tail_")  # the last, the exponential mean, the mean of the last quarter
QUALITIES = ("train_nll", "validation_nll", "validation_accuracy", "test_nll", "test_accuracy")  # NaN without the part
NOISE_SCALES = ("noise_scale", "noise_scale_preconditioned")
EPOCH_FIGURES = (
    "epoch",
    "step",
    *(iterate + quality for iterate in ITERATES for quality in QUALITIES),
    "sample_gradients",
    "wall_seconds",
    "evaluation_seconds",
    "bytes_sent",
    "bytes_sent_by_replicas",
    *NOISE_SCALES,
)
LATER = {*NOISE_SCALES, *(name for name in EPOCH_FIGURES if VALIDATION in name)}  # which earlier files have not
RUNNING, FINISHED, FAILED = "running", "finished", "failed: "
STATUS_BYTES = 1000
NETWORK = "network"  # attribute: its `models.description.Description`
WRITER = "writer_"  # before the names of the attributes that tell of the process
# In a run's file, beside the options: the data, and the step and folder of the newest checkpoint.
DIGEST, SAVED, SAVED_IN = "data_digest", "saved_step", "saved_in"
NONE_SAVED = -1
