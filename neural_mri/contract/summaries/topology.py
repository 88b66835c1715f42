"""T1 in short."""

import msgspec

from neural_mri.contract.components import Kind
from neural_mri.contract.models import Architecture
from neural_mri.contract.summaries.base import Stored, SummaryBase, absent, records

__all__ = ("TABLES", "Structure", "TopologySummary", "topology_summary")

TABLES = ("topology",)


class Structure(msgspec.Struct, frozen=True, kw_only=True):
    """A component of the model and its parameters."""

    type: Kind
    layer: int | None
    head: int | None
    kv_head: int | None
    """The key-value head that a query head reads."""
    parameters: int
    shared_parameters: int
    """Read by it and counted elsewhere."""


class TopologySummary(SummaryBase, frozen=True, kw_only=True, tag="T1"):
    """T1: the model's structure."""

    architecture: Architecture
    total_parameters: int
    """The sum over `data`: each storage counted once."""
    data: dict[str, Structure]


def topology_summary(stored: Stored) -> TopologySummary:
    """From the table `topology`."""
    table = stored.tables["topology"]
    data = {
        row["component"]: Structure(
            type=Kind(row["kind"]),
            layer=absent(row["layer"]),
            head=absent(row["head"]),
            kv_head=absent(row["kv_head"]),
            parameters=row["parameters"],
            shared_parameters=row["shared_parameters"],
        )
        for row in records(table)
    }
    return TopologySummary(
        **stored.shared(table),
        architecture=stored.architecture,
        total_parameters=sum(part.parameters for part in data.values()),
        data=data,
    )
