"""A few of the requests that `make fuzz` sends twenty thousand of."""

from tests.security.fuzzing import besieged, furnished, fuzz

CASES = 500


def test_every_answer_is_one_that_the_document_describes() -> None:
    with besieged() as service:
        report = fuzz(service, furnished(service), CASES, seed=0)
    assert report.findings == [], str(report)
    assert report.sent > CASES * 0.8, str(report)
    let_in = [name for name, seen in report.reached.items() if min(seen) < 300]
    assert len(let_in) > len(report.reached) / 2, str(report)
