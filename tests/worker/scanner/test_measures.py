import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.scanner.measures import largest


@given(
    width=st.integers(1, 3000),
    rows=st.integers(1, 4),
    count=st.integers(1, 20),
    seed=st.integers(0, 2**32 - 1),
)
@settings(deadline=None)
def test_the_largest_are_those_of_topk(width: int, rows: int, count: int, seed: int) -> None:
    count = min(count, width)
    values = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    found, expected = largest(values, count), values.topk(count)
    assert torch.equal(found.values, expected.values)
    assert torch.equal(values.gather(-1, found.indices), expected.values)


def test_the_largest_may_all_stand_in_one_column_or_beyond_the_fold() -> None:
    values = torch.zeros(1, 64 * 50 + 7)
    values[0, 3::50] = torch.arange(1.0, 66.0)
    values[0, -7:] = torch.arange(100.0, 107.0)
    assert largest(values, 12).values.tolist() == values.topk(12).values.tolist()


def test_ties_are_found_as_often_as_they_occur() -> None:
    values = torch.ones(2, 5000)
    found = largest(values, 10)
    assert found.values.tolist() == [[1.0] * 10] * 2
    assert all(len(set(row)) == 10 for row in found.indices.tolist())
