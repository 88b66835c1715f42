"""Requests made up from the document, valid and not, and what the service makes of them.

    python -m tests.security.fuzzing 20000

Every answer must be one that the document describes: its status, its media type, its body. None may be a
fault. Most requests name things that exist, because nothing is learnt from asking for what does not.
"""

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import hypothesis
import msgspec
import requests
import schemathesis
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from neural_mri.backing import models
from neural_mri.contract.archives import SESSION_FILE
from neural_mri.contract.auth import ALL_SCOPES
from neural_mri.contract.jobs import JobState
from tests.api.specimens import PROMPT, TINY
from tests.security.guarded import ROOT, Guarded, guarded
from tests.servers import database_copy, migrated_database, valkey

__all__ = ("Report", "Things", "besieged", "furnished", "fuzz")

PROMPTS = (PROMPT, "a", "The Eiffel Tower", "b")
WORDS: Mapping[str, Sequence[Any]] = {
    "model": (None, "tiny"),
    "baseline": (None, "tiny"),
    "prompt": PROMPTS,
    "corrupt_prompt": PROMPTS,
    "source_prompt": PROMPTS,
    "subject": ("The", "Eiffel Tower"),
    "answer": (" Paris", " in", None),
    "foil": (" Tower", None),
    "component": ("blocks.0.mlp", "blocks.1.attn.head_3", "blocks.1.resid_post", "embed"),
    "components": ("all", ["blocks.0.mlp"]),
    "layers": ("all", [0], [1, "blocks.0"]),
    "token_positions": ("all", [0], [-1]),
    "positions": ("all", [0]),
    "user": ("fuzz", None),
    "texts": (list(PROMPTS),),
    "job": ("01a208e5-620a-7f6d-98da-3f510d18b436",),
    "name": ("fuzz", "a session"),
    "revision": (None,),
    "values": ([0.5] * TINY.d_model,),
    "scans": (
        [{"scan_mode": "fMRI", "prompt": PROMPT}],
        [{"scan_mode": "T1"}, {"scan_mode": "FLAIR", "prompt": "a"}],
        [],
    ),
}
"""What the tiny model and the service know."""

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    response_headers_conformance,
]


@schemathesis.serializer(SESSION_FILE)
def _as_bytes(_: Any, value: Any) -> bytes:
    """A file is its bytes; what was made up in their place is sent as text."""
    return (
        value if isinstance(value, bytes) else getattr(value, "data", None) or str(value).encode()
    )


READS_FOR_EVER = frozenset(
    {"followJob", "followJobs", "followBatch", "followSession", "followShared"}
)
"""Operations that answer until what they tell of ends: only what has ended is followed."""

ROUND = 24
"""Requests to each operation, before it is the next round's turn."""

SESSIONS = 60
"""So many, because some are deleted on the way."""


class Things(NamedTuple):
    """What there is to be named, by the parameter that names it."""

    named: Mapping[str, Sequence[str]]
    ended: Mapping[str, Sequence[str]]
    """Those of them that change no more."""
    file: bytes
    """An exported session."""


class Finding(NamedTuple):
    """An answer that should not have been."""

    operation: str
    why: str
    how: str


class Report(NamedTuple):
    """What a run has seen."""

    sent: int
    statuses: Counter[int]
    reached: dict[str, Counter[int]]
    """Statuses by operation."""
    findings: list[Finding]
    seconds: float

    def __str__(self) -> str:
        faults = sum(count for status, count in self.statuses.items() if status >= 500)
        kinds = ", ".join(f"{status}: {count}" for status, count in sorted(self.statuses.items()))
        told = (
            f"{self.sent} requests to {len(self.reached)} operations in {self.seconds:.0f} s: "
            f"{faults} server errors, {len(self.findings)} kinds of undocumented answers"
        )
        lines = [told, f"answers by status: {kinds}"]
        refused = [name for name, seen in self.reached.items() if min(seen) >= 400]
        if refused:
            lines.append(f"never let in: {', '.join(sorted(refused))}")
        for finding in self.findings:
            lines += ["", f"{finding.operation}: {finding.why}", f"    {finding.how}"]
        return "\n".join(lines)


def fuzz(
    service: Guarded, things: Things, cases: int, *, seed: int, seconds: float = float("inf")
) -> Report:
    """Send so many requests, an equal share to each operation, round by round until the time is over."""
    schema = schemathesis.openapi.from_dict(service.document())
    results: list[Any] = list(schema.get_all_operations())
    found = [result.ok() for result in results]
    caller = _Caller(service)
    began = time.monotonic()
    while (left := cases - caller.sent) > 0 and time.monotonic() - began < seconds:
        share = max(1, min(ROUND, -(-left // len(found))))
        for operation in found:
            for mode, part in (
                (GenerationMode.POSITIVE, share - share // 3),
                (GenerationMode.NEGATIVE, share // 3),
            ):
                _run(operation, mode, part, caller, things, seed + caller.sent)
            service.world.sessions.write(models.set_wanted, "tiny", True)
            if time.monotonic() - began > seconds:
                break
    findings = list(caller.findings.values())
    findings += [
        Finding(str(line.get("path")), "logged as a fault", str(line)[:2000])
        for line in service.faults()
    ]
    took = time.monotonic() - began
    return Report(caller.sent, caller.statuses, caller.reached, findings, took)


def _run(
    operation: Any, mode: GenerationMode, cases: int, caller: "_Caller", things: Things, seed: int
) -> None:
    if cases <= 0:
        return
    try:
        strategy = operation.as_strategy(generation_mode=mode)

        @hypothesis.seed(seed)
        @hypothesis.settings(
            max_examples=cases,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @hypothesis.given(strategy, st.integers(0, 2**32 - 1))
        def once(case: Any, luck: int) -> None:
            caller.ask(case, random.Random(luck), things, is_wild=mode is GenerationMode.NEGATIVE)

        once()
    except hypothesis.errors.Unsatisfiable:
        pass  # nothing in it can be wrong


class _Caller:
    """Sends requests and keeps what should not have been."""

    def __init__(self, service: Guarded) -> None:
        self._service = service
        self._session = requests.Session()
        self._session.trust_env = False
        self._keys = [service.key("fuzz", ALL_SCOPES).key for _ in range(8)]
        self.sent = 0
        self.statuses: Counter[int] = Counter()
        self.reached: dict[str, Counter[int]] = {}
        self.findings: dict[tuple[str, str], Finding] = {}

    def ask(self, case: Any, luck: random.Random, things: Things, *, is_wild: bool) -> None:
        """Send a case, as it is or with names that mean something."""
        name = case.operation.definition.raw["operationId"]
        if luck.random() < (0.5 if is_wild else 0.85):
            _furnish(case, luck, things.ended if name in READS_FOR_EVER else things.named)
            if name == "importSession":
                case.body = _nibbled(things.file, luck)
            if name == "logIn" and isinstance(case.body, dict):
                case.body["key"] = luck.choice(self._keys)
        headers = {"Prefer": "wait=0"} if name == "getAttention" else {}
        if luck.random() < 0.97:
            headers["Authorization"] = f"Bearer {luck.choice(self._keys)}"
        try:
            response = case.call(
                base_url=self._service.url, session=self._session, headers=headers, timeout=20
            )
        except requests.exceptions.InvalidHeader:
            return  # not to be sent by anybody
        self.sent += 1
        self.statuses[response.status_code] += 1
        self.reached.setdefault(case.operation.label, Counter())[response.status_code] += 1
        # A stream is text; schemathesis would hold each of its events against the text's schema.
        is_stream = response.headers.get("content-type", [""])[0].startswith("text/event-stream")
        checks = [c for c in CHECKS if not (is_stream and c is response_schema_conformance)]
        try:
            case.validate_response(response, checks=checks)
        except FailureGroup as group:
            for failure in group.exceptions:
                key = (name, f"{type(failure).__name__} {response.status_code}")
                said = f"{response.status_code} {response.text[:600]}"
                curl = case.as_curl_command(headers={"Authorization": "..."})[:1500]
                self.findings.setdefault(
                    key,
                    Finding(
                        name, f"{failure.title}: {failure.message[:800]}", f"{curl}\n    {said}"
                    ),
                )


def _nibbled(file: bytes, luck: random.Random) -> bytes:
    """A file that has been through much."""
    damaged = bytearray(file)
    for _ in range(luck.choice((0, 1, 1, 5, 50))):
        damaged[luck.randrange(len(damaged))] = luck.randrange(256)
    return bytes(damaged[: luck.randrange(len(damaged)) if luck.random() < 0.2 else None])


def _furnish(case: Any, luck: random.Random, names: Mapping[str, Sequence[str]]) -> None:
    """Put what exists in place of what was made up, here and there."""
    for where in (case.path_parameters, case.query, case.headers):
        for parameter in list(where or {}):
            if parameter in names and luck.random() < 0.9:
                where[parameter] = luck.choice(names[parameter])
            elif parameter in WORDS and luck.random() < 0.7:
                where[parameter] = luck.choice(WORDS[parameter]) or "tiny"
    _furnish_body(case.body, luck, names)


def _furnish_body(part: Any, luck: random.Random, names: Mapping[str, Sequence[str]]) -> None:
    if isinstance(part, dict):
        for field in part:
            if field in names and luck.random() < 0.9:
                part[field] = luck.choice(names[field])
            elif field in WORDS and luck.random() < 0.9:
                part[field] = luck.choice(WORDS[field])
            else:
                _furnish_body(part[field], luck, names)
    elif isinstance(part, list):
        for each in part:
            _furnish_body(each, luck, names)


def furnished(service: Guarded) -> Things:
    """Jobs in every state, their batch, sessions with links, and a key: all of one user."""
    world = service.world
    world.register()
    user = service.key("fuzz", ALL_SCOPES)
    with service.client(user) as api:
        done, failed, cancelled, waiting = (
            str(_made(api, "/api/scan/activation", {"prompt": prompt})["id"]) for prompt in PROMPTS
        )
        batch = _made(api, "/api/batches", {"scans": [{"scan_mode": "fMRI", "prompt": PROMPT}]})[
            "id"
        ]
        api.delete(f"/api/jobs/{cancelled}")
        taken = {str(job.id): job for job in (world.claim(world.queue()) for _ in range(2))}
        world.perform(taken[done])
        problem = {
            "type": "about:blank",
            "title": "Internal Server Error",
            "status": 500,
            "detail": "x",
        }
        world.move(world.move(taken[failed], JobState.RUNNING), JobState.FAILED, problem=problem)
        kept = {"name": "fuzz", "scans": [{"job": done}], "notes": [{"text": "here"}]}
        sessions = [_made(api, "/api/sessions", kept) for _ in range(SESSIONS)]
        access = ("read", "fork", "contribute")
        links = [
            _made(api, f"/api/sessions/{each['id']}/shares", {"access": access[at % 3]})
            for at, each in enumerate(sessions)
        ]
        file = api.get(f"/api/sessions/{sessions[0]['id']}/export").content
    jobs = [done, failed, cancelled, waiting]
    common = {
        "layer": ["0", "1"],
        "key_id": [user.id],
        "table": ["activations", "predictions", "norms"],
        "user": ["fuzz"],
        "jobs": jobs[:3],
        "job_id": jobs[:3],
        "batch_id": [batch],
    }
    ids = [each["id"] for each in sessions]
    return Things(
        named={
            **common,
            "jobs": jobs,
            "job_id": jobs,
            "job": jobs,
            "session_id": ids,
            "other": ids,
            "share_id": [each["id"] for each in links],
            "Share-Token": [each["token"] for each in links],
            "If-Match": ["*", sessions[0]["head"]],
            "result": [each["result"] for each in sessions[0]["document"]["scans"]],
        },
        ended=common,
        file=file,
    )


def _made(api: httpx.Client, path: str, body: dict[str, Any]) -> Any:
    answer = api.post(path, json=body)
    assert answer.status_code in (201, 202), answer.text
    return answer.json()


@contextmanager
def besieged() -> Iterator[Guarded]:
    """A service to be tried, with everything it stands on."""
    with tempfile.TemporaryDirectory(prefix="nmri-") as name, valkey() as redis:
        folder = Path(name)
        settings = msgspec.structs.replace(
            database_copy(migrated_database(folder / "template"), folder / "data"),
            redis_url=redis.url,
            viewer_dir=ROOT / "web" / "dist",
            default_model="tiny",
            pinned_models="",
        )
        # No worker takes what is asked for.
        with guarded(settings, folder, max_queued_jobs=10_000_000, user_max_jobs=0) as service:
            yield service


def main() -> int:
    """The exit status: 0 where every answer was one that is described."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", type=int, nargs="?", default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no longer than so")
    given = parser.parse_args()
    with besieged() as service:
        report = fuzz(
            service, furnished(service), given.cases, seed=given.seed, seconds=given.seconds
        )
    sys.stdout.write(f"{report}\n")
    return 1 if report.findings or report.sent < given.cases else 0


if __name__ == "__main__":
    sys.exit(main())
