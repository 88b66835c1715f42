"""Users, their limits and the record, from Python and from the shell: the real API with keys."""

import asyncio
from collections.abc import Iterator
from uuid import UUID

import pytest

from neural_mri.backing.settings import Settings
from neural_mri.cli.exits import ExitCode
from neural_mri.client import Client, Refused
from neural_mri.client.access import Access
from neural_mri.client.asynchronous import AsyncAccess
from neural_mri.contract.auth import AuditAction, NewKey, Scope, UserLimits
from neural_mri.contract.scans import ActivationScan
from tests.api.keyed import Door, keyed
from tests.api.shell import Shell
from tests.api.specimens import PROMPT
from tests.api.world import World

ADMIN = (Scope.ADMIN,)


@pytest.fixture(scope="module")
def shared_door(shared_settings: Settings) -> Iterator[Door]:
    with keyed(shared_settings, user_max_jobs=7) as door:
        yield door


@pytest.fixture
def door(shared_door: Door, world: World, monkeypatch: pytest.MonkeyPatch) -> Door:
    monkeypatch.setenv("NMRI_URL", shared_door.url)
    monkeypatch.setenv("NMRI_API_KEY", shared_door.key(world, "root", ADMIN).key)
    return shared_door


@pytest.fixture
def shell(door: Door, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


def test_limits_are_set_seen_and_taken_back(door: Door, world: World) -> None:
    key = door.key(world).key
    with Access() as root, Client(api_key=key) as ada:
        assert ada.usage().max_jobs == 7
        ada.submit(ActivationScan(prompt=PROMPT))
        limited = root.set_limits("ada", UserLimits(max_jobs=1, daily_seconds=60))
        assert (limited.user, limited.in_flight) == ("ada", 1)
        assert ada.usage() == limited
        assert limited in root.users()
        with Client(api_key=key, patience_seconds=0) as hasty, pytest.raises(Refused) as refused:
            hasty.submit(ActivationScan(prompt="a"))
        assert refused.value.status == 429
        assert root.set_limits("ada", UserLimits()).max_jobs == 7
        assert root.usage().user == "root"
        with pytest.raises(ValueError, match="is no user's name"):
            root.set_limits("..", UserLimits())


def test_the_record_is_read_page_by_page(
    door: Door, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neural_mri.client.access._PAGE", 2)
    with Access() as root:
        made = [root.create(NewKey(user="ada", label=str(n))).id for n in range(5)]
        root.set_limits("ada", UserLimits(max_jobs=1))
        entries = list(root.audit())
        assert [each.subject for each in entries] == ["ada", *reversed(made)]
        keys = list(root.audit(action="key_created", limit=3))
        assert [each.subject for each in keys] == made[:1:-1]
        older = root.audit(before=keys[-1].id, user="root", action=AuditAction.KEY_CREATED)
        assert [each.subject for each in older] == made[1::-1]
        assert list(root.audit(user="ada")) == []


def test_the_same_is_awaited(door: Door, world: World) -> None:
    async def asked() -> list[AuditAction]:
        async with AsyncAccess() as root:
            await root.set_limits("ada", UserLimits(max_jobs=3))
            assert (await root.users())[0].max_jobs == 3
            return [entry.action async for entry in root.audit()]

    assert asyncio.run(asked()) == [AuditAction.LIMITS_SET]


def test_only_an_admin_sees_the_others(door: Door, world: World) -> None:
    with Access(api_key=door.key(world).key) as ada:
        for forbidden in (ada.users, lambda: list(ada.audit())):
            with pytest.raises(Refused) as refused:
                forbidden()
            assert refused.value.status == 403


def test_an_admin_sets_limits_from_the_shell(shell: Shell, door: Door, world: World) -> None:
    door.key(world, "ada")
    said = shell("users", "limit", "ada", "--max-jobs", "50", "--daily-seconds", "7200")
    assert said.code == ExitCode.DONE
    assert said.out.split()[-6:] == ["ada", "0", "50", "0.0", "s", "2:00:00"]
    listed = {each["user"]: each for each in shell("users", "list", "--json").json}
    assert (listed["ada"]["max_jobs"], listed["ada"]["daily_seconds"]) == (50, 7200)
    assert "50" in shell("users", "list").out
    none = shell("users", "limit", "ada", "--max-jobs", "none", "--json").json
    assert (none["max_jobs"], none["daily_seconds"]) == (None, None)
    assert shell("users", "limit", "ada", "--usual", "--json").json["max_jobs"] == 7
    assert shell("usage", "--json").json["user"] == "root"
    assert "root" in shell("usage").out


def test_the_record_is_told_in_the_shell(shell: Shell) -> None:
    shell("users", "limit", "ada", "--max-jobs", "5")
    shell("keys", "create", "--user", "bob", "--label", "ci")
    told = shell("audit")
    assert "limits_set" in told.out
    assert "max_jobs 5" in told.out
    (line,) = shell("audit", "--action", "key_created", "--limit", "1", "--json").lines
    assert (line["user"], line["details"]["user"]) == ("root", "bob")
    (older,) = shell("audit", "--before", line["id"], "--json").lines
    assert (older["action"], UUID(older["id"]).version) == ("limits_set", 7)
    assert shell("audit", "--user", "ada", "--json").out == ""


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("users", "limit", "ada"), "--usual"),
        (("users", "limit", "ada", "--usual", "--max-jobs", "3"), "--usual"),
        (("users", "limit", "ada", "--max-jobs", "-3"), "'-3'"),
        (("users", "limit", "ada", "--max-jobs", "1.5"), "'1.5'"),
        (("users", "limit", "ada", "--daily-seconds", "much"), "'much'"),
        (("users", "limit", "..", "--max-jobs", "3"), "'..'"),
        (("audit", "--action", "theft"), "key_created"),
        (("audit", "--before", "yesterday"), "'yesterday'"),
        (("audit", "--limit", "0"), "'0'"),
    ],
)
def test_bad_usage_names_the_value(shell: Shell, arguments: tuple[str, ...], names: str) -> None:
    said = shell(*arguments)
    assert (said.code, said.out) == (ExitCode.USAGE, "")
    assert names in said.err
