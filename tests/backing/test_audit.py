"""Deeds are kept and read back, whatever they are, on every database."""

import pytest

from neural_mri.backing import audit
from neural_mri.backing.audit import CONSOLE, Deed
from neural_mri.backing.database import Sessions
from neural_mri.contract.auth import AuditAction


@pytest.mark.parametrize("action", AuditAction)
def test_a_deed_reads_back_as_it_was_done(sessions: Sessions, action: AuditAction) -> None:
    deed = Deed(action, "a subject", {"of": "it"})
    sessions.write(audit.record, CONSOLE, deed)
    (entry,) = sessions.read(audit.entries, limit=10, action=action)
    assert Deed(entry.action, entry.subject, entry.details) == deed
    assert entry.user == CONSOLE.user
