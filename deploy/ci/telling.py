"""Tell a pull or merge request what a diagnosis found: in one comment, which later runs rewrite.

    python deploy/ci/telling.py REPORT.md NAME

Which request that is, and where, is read from the environment as GitHub and GitLab set it; `NMRI_TOKEN` is what
may write there. Reports of several names on one request are several comments.
"""

import hashlib
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import httpx

__all__ = ("main",)

MOST_CHARACTERS = 60_000
"""A comment on GitHub holds 65,536."""
PAGE = 100


class Place(NamedTuple):
    """Where a request's comments are."""

    comments: str
    """The address that lists them and takes another."""
    comment: str
    """The address of one, up to its id."""
    who: str
    """The address that tells whose the token is."""
    rewrite: str
    """The method that changes one."""
    headers: dict[str, str]

    def is_ours(self, comment: Mapping[str, Any], client: httpx.Client) -> bool:
        """Whether a comment is this token's: nobody else's is ever rewritten."""
        author = comment["user" if self.rewrite == "PATCH" else "author"] or {}
        me = client.get(self.who)
        if self.rewrite == "PATCH" and me.status_code in {401, 403}:
            # A job's own token may not ask who it is; comments of jobs are a bot's.
            return bool(author.get("type") == "Bot")
        return bool(author.get("id") == me.raise_for_status().json()["id"])


def place_of(environment: Mapping[str, str]) -> Place:
    """The request this job runs for. Raises `KeyError` that names what the environment lacks."""
    token = environment["NMRI_TOKEN"].strip()  # a header with a line's end is refused, and quoted
    if "CI_MERGE_REQUEST_IID" in environment:
        # A fork's pipeline is the fork's, but the request counts in the project that it is made to.
        whose = environment.get("CI_MERGE_REQUEST_PROJECT_ID") or environment["CI_PROJECT_ID"]
        project = f"{environment['CI_API_V4_URL']}/projects/{whose}"
        notes = f"{project}/merge_requests/{environment['CI_MERGE_REQUEST_IID']}/notes"
        who = f"{environment['CI_API_V4_URL']}/user"
        return Place(notes, notes, who, "PUT", {"PRIVATE-TOKEN": token})
    repository = f"{environment['GITHUB_API_URL']}/repos/{environment['GITHUB_REPOSITORY']}"
    return Place(
        f"{repository}/issues/{environment['NMRI_PULL_REQUEST']}/comments",
        f"{repository}/issues/comments",
        f"{environment['GITHUB_API_URL']}/user",
        "PATCH",
        {"Authorization": f"Bearer {token}", "Accept": "application/vnd.github+json"},
    )


def tell(place: Place, report: str, name: str) -> None:
    """Write the comment, or write it anew."""
    named = re.sub(r"[^\w./]+", "_", name)
    if named != name:  # what a mark cannot hold may be all that tells two names apart
        named += f" {hashlib.sha256(name.encode()).hexdigest()[:8]}"
    mark = f"<!-- neural-mri {named} -->"
    shown = report if len(report) <= MOST_CHARACTERS else f"{report[:MOST_CHARACTERS]}\n\n…\n"
    body = {"body": f"{mark}\n{shown}"}
    with httpx.Client(headers=place.headers, timeout=30) as client:
        mine = (
            comment["id"]
            for comment in _comments(client, place)
            if (comment["body"] or "").startswith(mark) and place.is_ours(comment, client)
        )
        if (known := next(mine, None)) is None:
            answer = client.post(place.comments, json=body)
        else:
            answer = client.request(place.rewrite, f"{place.comment}/{known}", json=body)
        answer.raise_for_status()


def _comments(client: httpx.Client, place: Place) -> Iterator[dict[str, Any]]:
    for number in count(1):
        query = {"per_page": str(PAGE), "page": str(number)}
        page = client.get(place.comments, params=query).raise_for_status().json()
        yield from page
        if len(page) < PAGE:
            return


def main(arguments: Sequence[str]) -> int:
    """The exit status; 1 with a sentence where it could not be told."""
    report, name = arguments
    try:
        tell(place_of(os.environ), Path(report).read_text("utf-8"), name)
    except KeyError as error:
        sys.stderr.write(f"neural-mri: nobody is told: {error} is not set\n")
        return 1
    except (httpx.HTTPError, OSError) as error:
        sys.stderr.write(f"neural-mri: nobody is told: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
