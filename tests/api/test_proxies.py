"""Whose request it is, where proxies stand between."""

from ipaddress import ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.proxies import Proxies
from neural_mri.backing.settings import Settings
from tests.api.keyed import keyed
from tests.api.world import World

OURS = Proxies((ip_network("10.0.0.0/8"), ip_network("fd00::/8")))
LOGINS = 3


@pytest.mark.parametrize(
    ("peer", "forwarded", "caller"),
    [
        ("198.51.100.9", ["203.0.113.5"], "198.51.100.9"),  # no proxy of ours: nobody's word
        ("10.0.0.2", [], "10.0.0.2"),
        ("10.0.0.2", ["203.0.113.5"], "203.0.113.5"),
        ("10.0.0.2", ["1.1.1.1, 203.0.113.5, 10.0.0.7"], "203.0.113.5"),  # the first is a lie
        ("10.0.0.2", ["1.1.1.1", "203.0.113.5"], "203.0.113.5"),
        ("10.0.0.2", ["10.0.0.9, 10.0.0.8"], "10.0.0.9"),
        ("10.0.0.2", ["203.0.113.5, unknown"], "10.0.0.2"),
        ("10.0.0.2", [""], "10.0.0.2"),
        ("10.0.0.2", ["203.0.113.5:4711"], "203.0.113.5"),
        ("fd00::1", ["[2001:db8::7]:443"], "2001:db8::7"),
        ("fd00::1", ["2001:db8::7"], "2001:db8::7"),
        ("::ffff:10.0.0.2", ["203.0.113.5"], "203.0.113.5"),
        ("", ["203.0.113.5"], ""),
    ],
)
def test_the_last_that_is_no_proxy_of_ours_is_the_caller(
    peer: str, forwarded: list[str], caller: str
) -> None:
    assert OURS.origin(peer, forwarded) == caller


@given(st.lists(st.text(max_size=40), max_size=4))
def test_whatever_a_caller_writes_what_the_proxy_adds_counts(lies: list[str]) -> None:
    assert OURS.origin("10.0.0.2", [*lies, "203.0.113.5"]) == "203.0.113.5"


def test_behind_a_gateway_each_has_their_own_tries_and_nobody_elses(
    shared_settings: Settings, world: World
) -> None:
    def tries(address: str, count: int) -> list[int]:
        with door.client("nmri_wrong") as client:
            headers = {"x-forwarded-for": address}
            return [client.get("/api/jobs", headers=headers).status_code for _ in range(count)]

    bounds = {"login_requests_a_minute": LOGINS}
    with keyed(shared_settings, trusted_proxies="127.0.0.0/8", **bounds) as door:
        assert tries("198.51.100.1", LOGINS + 1) == [401] * LOGINS + [429]
        assert tries("198.51.100.2", 1) == [401]
        assert tries("6.6.6.6, 198.51.100.1", 1) == [429]
    with keyed(shared_settings, **bounds) as door:
        assert tries("198.51.100.7", LOGINS) == [401] * LOGINS
        assert tries("198.51.100.8", 1) == [429], "nobody is trusted unless named"
