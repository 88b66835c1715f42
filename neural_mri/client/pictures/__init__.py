"""Pictures of the scans that say why: weights, circuits, the lens, stimulation. One module a scan.

Imports matplotlib, so it is itself imported only when a picture is asked for.
"""

from neural_mri.client.pictures.calibration import ordinary_picture
from neural_mri.client.pictures.circuits import circuit_picture
from neural_mri.client.pictures.lens import lens_picture
from neural_mri.client.pictures.restoration import restoration_picture
from neural_mri.client.pictures.stimulation import comparison_picture
from neural_mri.client.pictures.weights import weight_picture

__all__ = (
    "circuit_picture",
    "comparison_picture",
    "lens_picture",
    "ordinary_picture",
    "restoration_picture",
    "weight_picture",
)
