"""A pull or merge request is told once, and told anew by later runs."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.hosts import ME, Host, host

ROOT = Path(__file__).parents[2]


@pytest.fixture
def code_host() -> Iterator[Host]:
    with host() as opened:
        yield opened


def environment(kind: str, code_host: Host) -> dict[str, str]:
    if kind == "github":
        return {
            "GITHUB_API_URL": code_host.url,
            "GITHUB_REPOSITORY": "a/b",
            "NMRI_PULL_REQUEST": "5",
            "NMRI_TOKEN": "secret",
        }
    return {
        "CI_API_V4_URL": f"{code_host.url}/api/v4",
        "CI_PROJECT_ID": "34",  # a fork's
        "CI_MERGE_REQUEST_PROJECT_ID": "12",
        "CI_MERGE_REQUEST_IID": "5",
        "NMRI_TOKEN": "secret",
    }


def told(
    report: Path, text: str, variables: dict[str, str], name: str = "quick"
) -> subprocess.CompletedProcess[str]:
    report.write_text(text)
    return subprocess.run(
        [sys.executable, str(ROOT / "deploy/ci/telling.py"), str(report), name],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **variables},
        capture_output=True,
        text=True,
        check=False,
    )


PLACES = {
    "github": ("/repos/a/b/issues/5/comments", "PATCH", "/repos/a/b/issues/comments"),
    "gitlab": ("/api/v4/projects/12/merge_requests/5/notes", "PUT", None),
}


@pytest.mark.parametrize("kind", PLACES)
def test_later_runs_rewrite_what_the_first_said_and_nothing_that_others_said(
    kind: str, code_host: Host, tmp_path: Path
) -> None:
    variables, (place, rewrite, one) = environment(kind, code_host), PLACES[kind]
    for number in range(100):
        code_host.write(f"said {number}")
    code_host.write("<!-- neural-mri quick -->\nnot ours")
    assert told(tmp_path / "a.md", "## first", variables).returncode == 0
    assert told(tmp_path / "a.md", "## second", variables).returncode == 0
    assert told(tmp_path / "a.md", "## other", variables, "mine --> <b>").returncode == 0
    assert [each["body"] for each in code_host.comments[100:]] == [
        "<!-- neural-mri quick -->\nnot ours",
        "<!-- neural-mri quick -->\n## second",
        f"<!-- neural-mri mine_b_ {hashlib.sha256(b'mine --> <b>').hexdigest()[:8]} -->\n## other",
    ]
    assert code_host.comments[101]["user"] == ME
    assert code_host.asked == [("POST", place), (rewrite, f"{one or place}/102"), ("POST", place)]
    assert code_host.tokens == {"Bearer secret" if kind == "github" else "secret"}


@pytest.mark.parametrize("tells_who_asks", [False, True], ids=["a job's own", "a person's"])
def test_on_github_a_token_rewrites_its_own_comment(
    code_host: Host, tmp_path: Path, *, tells_who_asks: bool
) -> None:
    code_host.tells_who_asks = tells_who_asks
    me = {"id": ME["id"], "type": "User" if tells_who_asks else "Bot"}
    code_host.write("<!-- neural-mri quick -->\nof nobody who is still there", {})
    code_host.comments[0]["user"] = None
    code_host.write("<!-- neural-mri quick -->\nnot ours")
    if tells_who_asks:
        code_host.write("<!-- neural-mri quick -->\nanother bot's", {"id": 9, "type": "Bot"})
    others = [each["body"] for each in code_host.comments]
    code_host.write("<!-- neural-mri quick -->\n## first", me)
    variables = environment("github", code_host) | {"NMRI_TOKEN": "secret\n"}
    assert told(tmp_path / "a.md", "## second", variables).returncode == 0
    assert [each["body"] for each in code_host.comments] == [
        *others,
        "<!-- neural-mri quick -->\n## second",
    ]
    assert code_host.tokens == {"Bearer secret"}


def test_a_report_longer_than_a_comment_is_cut(code_host: Host, tmp_path: Path) -> None:
    assert told(tmp_path / "a.md", "가" * 90_000, environment("github", code_host)).returncode == 0
    (comment,) = code_host.comments
    assert 60_000 < len(comment["body"]) < 65_536
    assert comment["body"].endswith("…\n")


def test_who_cannot_tell_says_why_and_never_the_token(code_host: Host, tmp_path: Path) -> None:
    variables = environment("github", code_host)
    missing = {name: value for name, value in variables.items() if name != "NMRI_PULL_REQUEST"}
    lost = {**variables, "GITHUB_API_URL": "http://127.0.0.1:9"}
    for wrong, said in ((missing, "NMRI_PULL_REQUEST"), (lost, "nobody is told")):
        answer = told(tmp_path / "a.md", "text", wrong)
        assert answer.returncode == 1
        assert said in answer.stderr
        assert "secret" not in answer.stderr
        assert "Traceback" not in answer.stderr
