"""The Python client: scans over HTTP, results as Arrow tables, arrays, data frames and pictures.

    with neural_mri.Client() as mri:
        result = mri.scan_activation("The Eiffel Tower is located in the city of")
        result.activations().hottest(Kind.HEAD, 5)

Knows the contract and HTTP; needs nothing of the service's side installed.
"""

from neural_mri.client.access import Access
from neural_mri.client.activation_map import ActivationMap, Grid, Reading
from neural_mri.client.asynchronous import (
    AsyncAccess,
    AsyncBatches,
    AsyncClient,
    AsyncSessions,
    AsyncSharedSession,
)
from neural_mri.client.batches import Batches, Outcome
from neural_mri.client.circuit_map import CircuitMap
from neural_mri.client.client import Client
from neural_mri.client.comparison import Comparison
from neural_mri.client.errors import (
    ClientClosed,
    ClientError,
    Damaged,
    JobCancelled,
    JobEnded,
    JobFailed,
    Late,
    MissingExtra,
    NotUnderstood,
    Refused,
    Unreachable,
)
from neural_mri.client.exchange import (
    DEFAULT_URL,
    KEY_VARIABLE,
    PATIENCE_VARIABLE,
    TIMEOUT_VARIABLE,
    URL_VARIABLE,
)
from neural_mri.client.lens_map import LensMap
from neural_mri.client.restoration import Restoration
from neural_mri.client.result import Prediction, Result
from neural_mri.client.sessions import (
    KeptResult,
    OpenedSession,
    Sessions,
    SharedSession,
    read_file,
)
from neural_mri.client.watching import JobEvent
from neural_mri.client.weight_map import WeightMap

__all__ = (
    "DEFAULT_URL",
    "KEY_VARIABLE",
    "PATIENCE_VARIABLE",
    "TIMEOUT_VARIABLE",
    "URL_VARIABLE",
    "Access",
    "ActivationMap",
    "AsyncAccess",
    "AsyncBatches",
    "AsyncClient",
    "AsyncSessions",
    "AsyncSharedSession",
    "Batches",
    "CircuitMap",
    "Client",
    "ClientClosed",
    "ClientError",
    "Comparison",
    "Damaged",
    "Grid",
    "JobCancelled",
    "JobEnded",
    "JobEvent",
    "JobFailed",
    "KeptResult",
    "Late",
    "LensMap",
    "MissingExtra",
    "NotUnderstood",
    "OpenedSession",
    "Outcome",
    "Prediction",
    "Reading",
    "Refused",
    "Restoration",
    "Result",
    "Sessions",
    "SharedSession",
    "Unreachable",
    "WeightMap",
    "read_file",
)
