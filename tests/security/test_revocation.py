"""What a revoked key still opens: nothing, not even what it had opened before."""

import time
from collections.abc import Callable
from itertools import islice

import httpx
import pytest

from tests.api.specimens import PROMPT
from tests.security.guarded import Guarded

MOST_HEARTBEATS = 3
"""One until it is asked whether the key is still good, and what is on its way."""


def queued(api: httpx.Client, prompt: str = PROMPT) -> str:
    """A job that waits, because nobody works."""
    answer = api.post("/api/scan/activation", json={"prompt": f"{prompt} {time.monotonic_ns()}"})
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def revoked(service: Guarded, browser: httpx.Client, key_id: str) -> None:
    with service.client(service.key("ada")) as other:
        assert other.delete(f"/api/keys/{key_id}").status_code == 200


def logged_out(service: Guarded, browser: httpx.Client, key_id: str) -> None:
    with httpx.Client(base_url=service.url, cookies=dict(browser.cookies)) as same:
        assert same.post("/api/logout").status_code == 204


def by_key(api: httpx.Client) -> None:
    """The key comes with every request."""


def by_cookie(api: httpx.Client) -> None:
    """The key came once."""
    key = api.headers.pop("authorization").removeprefix("Bearer ")
    assert api.post("/api/login", json={"key": key}).status_code == 200


@pytest.mark.parametrize(
    ("identified", "ended"), [(by_key, revoked), (by_cookie, revoked), (by_cookie, logged_out)]
)
@pytest.mark.parametrize("n_jobs", [1, 2])
def test_a_stream_ends_with_the_key_or_session_it_was_opened_with(
    service: Guarded,
    identified: Callable[[httpx.Client], None],
    ended: Callable[[Guarded, httpx.Client, str], None],
    n_jobs: int,
) -> None:
    key = service.key("ada")
    with service.client(key) as api:
        identified(api)
        jobs = [queued(api) for _ in range(n_jobs)]
        path = (
            f"/api/jobs/{jobs[0]}/events" if n_jobs == 1 else f"/api/events?jobs={','.join(jobs)}"
        )
        with api.stream("GET", path) as response:
            lines = response.iter_lines()
            assert next(line for line in lines if line.startswith("event:")) == "event: state"
            ended(service, api, key.id)
            heard = list(islice(lines, 100))
        assert heard.count(":") <= MOST_HEARTBEATS
        assert "event: ended" not in heard
        assert api.get(path).status_code == 401


def test_a_stream_whose_key_is_good_goes_on(service: Guarded) -> None:
    heartbeats = 0
    with (
        service.client(service.key("ada")) as api,
        api.stream("GET", f"/api/jobs/{queued(api)}/events") as response,
    ):
        for line in response.iter_lines():
            heartbeats += line == ":"
            if heartbeats == 4:
                break
    assert heartbeats == 4
