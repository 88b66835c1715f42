"""What the commands print and write, and that standard output holds nothing else."""

import io
import re
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pyarrow as pa
import pytest
from matplotlib.image import imread
from pyarrow import csv

from neural_mri import __version__
from neural_mri.cli import report
from neural_mri.cli.app import run
from neural_mri.cli.exits import ExitCode
from neural_mri.contract.events import Ended
from neural_mri.contract.jobs import JobState, JobView
from neural_mri.contract.models import ModelInfo
from neural_mri.contract.problems import PromptTooLong
from neural_mri.contract.results import provenance_of
from neural_mri.contract.scans import ActivationScan, AttentionScan, StructuralScan, decode_scan
from neural_mri.contract.tokens import Tokens
from tests.client.specimens import MODEL, TOKENS
from tests.client.wire import Wire, json_answer, problem_answer

PROMPT = "The Eiffel Tower is in"


class Said(NamedTuple):
    code: int
    out: str
    err: str


class Shell:
    """Runs commands in this process."""

    def __init__(self, capture: pytest.CaptureFixture[str]) -> None:
        self._capture = capture

    def __call__(self, *arguments: str) -> Said:
        code = run(arguments)
        captured = self._capture.readouterr()
        return Said(code, captured.out, captured.err)


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str], wire: Wire) -> Shell:
    return Shell(capsys)


def asked_for(wire: Wire) -> Any:
    """The scan that was sent."""
    (body,) = [asked.body for asked in wire.asked if asked.path.startswith("/api/scan/")]
    return decode_scan(body)


def test_an_activation_scan_is_reported_with_values_units_and_ranks(shell: Shell) -> None:
    said = shell("scan", "activation", PROMPT)
    assert said.code == ExitCode.DONE
    assert said.err == ""
    for line in (
        r"fMRI · tiny · 7e577e57",
        r"0 The\*  1 ␣Eiffel",
        r"Next token after token 4 ␣in",
        r"1  ␣Paris +0\.700  █+",
        r"Hottest heads at token 4 ␣in \(L2 norm\)",
        r"1  L3H2 +12\.4  █+",
        r"Hottest MLPs at token 4 ␣in \(L2 norm\)",
        r"1  L3 MLP +44\.4",
        r"H2 [▁▂▃▄▅▆▇█]{4}$",
        r"MLP [▁▂▃▄▅▆▇█]{4}$",
        r"forward 0\.090 s · scanner 0\.100 s · submitted to stored",
        r"job [0-9a-f-]{36} · scan 5ca95ca95ca95ca9",
    ):
        assert re.search(line, said.out, re.MULTILINE), line


def test_a_prompt_cannot_drive_the_terminal(shell: Shell) -> None:
    said = shell("scan", "activation", PROMPT)
    assert "\x1b" not in said.out
    assert "\\x1b[2J" in said.out


def test_of_a_long_prompt_the_tokens_in_between_are_left_out(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "_FIRST_TOKENS", 1)
    monkeypatch.setattr(report, "_LAST_TOKENS", 2)
    said = shell("scan", "activation", PROMPT)
    assert "0 The*  … 2 more …  3 ␣is  4 ␣in" in said.out


def test_what_is_asked_for_is_what_is_sent(shell: Shell, wire: Wire) -> None:
    said = shell(
        *("scan", "activation", PROMPT, "--model", "tiny", "--layers", "0,2-3,blocks.1.attn.h2"),
        *("--aggregation", "mean", "--tokens", "-1,2", "--no-residual", "--top", "20"),
        *("--lane", "batch"),
    )
    assert said.code == ExitCode.DONE
    assert asked_for(wire) == ActivationScan(
        model="tiny",
        prompt=PROMPT,
        layers=(
            *("blocks.0.attn", "blocks.0.mlp", "blocks.2.attn", "blocks.2.mlp"),
            *("blocks.3.attn", "blocks.3.mlp", "blocks.1.attn.head_2"),
        ),
        aggregation="mean",  # type: ignore[arg-type]
        token_positions=(-1, 2),
        include_residual=False,
        top_predictions=20,
    )
    assert wire.asked[0].query == {"lane": "batch"}


def test_json_is_the_only_thing_on_standard_output(shell: Shell, wire: Wire) -> None:
    said = shell("scan", "activation", PROMPT, "--json")
    document = msgspec.json.decode(said.out)
    (job_id,) = wire.jobs
    assert document["id"] == str(job_id)
    assert document["state"] == "succeeded"
    assert document["result"]["prompt_tokens"] == list(TOKENS)
    assert said.err == ""


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        (("models",), list[ModelInfo]),
        (("model", "info", "tiny"), ModelInfo),
        (("model", "load", "tiny"), JobView),
        (("model", "unload", "tiny"), JobView),
        (("tokenize", PROMPT), Tokens),
        (("jobs",), list[JobView]),
        (("health",), dict[str, str]),
        (("scan", "structural"), JobView),
        (("scan", "attention", PROMPT, "--layer", "1"), JobView),
        (("scan", "activation", PROMPT, "--no-wait"), JobView),
    ],
)
def test_every_command_speaks_json(shell: Shell, arguments: tuple[str, ...], kind: type) -> None:
    said = shell(*arguments, "--json")
    assert said.code == ExitCode.DONE
    msgspec.json.decode(said.out, type=kind)
    assert said.out.count("\n") == 1


def test_the_prompt_can_come_from_standard_input(
    shell: Shell, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    stdin = io.TextIOWrapper(io.BytesIO("서울은\n도시\r\n".encode()))
    monkeypatch.setattr("sys.stdin", stdin)
    assert shell("scan", "activation", "-", "--quiet").code == ExitCode.DONE
    assert asked_for(wire).prompt == "서울은\n도시"


@pytest.mark.parametrize(
    ("body", "complaint"), [(b"", "the prompt is empty"), (b"\xff\xfe", "is not UTF-8")]
)
def test_standard_input_that_is_no_prompt_is_refused(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, body: bytes, complaint: str
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(body)))
    said = shell("scan", "activation", "-")
    assert said.code == ExitCode.USAGE
    assert complaint in said.err


def test_a_result_can_be_taken_away_in_three_formats(
    shell: Shell, wire: Wire, tmp_path: Path
) -> None:
    arrow, table, picture = (tmp_path / name for name in ("a.arrow", "a.csv", "a.png"))
    said = shell(
        *("scan", "activation", PROMPT, "--arrow", str(arrow), "--csv", str(table)),
        *("--plot", str(picture)),
    )
    assert said.code == ExitCode.DONE
    assert said.err.splitlines() == [f"wrote {path}" for path in (arrow, table, picture)]
    (job,) = wire.jobs.values()
    assert job.stored is not None
    assert arrow.read_bytes() == job.stored.chunks["activations"]
    with pa.ipc.open_file(arrow) as reader:
        assert provenance_of(reader.read_all()).unit == "L2 norm"
    assert csv.read_csv(table).column_names[-3:] == ["position", "token", "value"]
    assert imread(picture).shape[2] == 4


def test_quiet_is_quiet(shell: Shell, tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    assert shell("scan", "structural", "-q", "--arrow", str(path)) == Said(ExitCode.DONE, "", "")
    assert path.exists()


def test_a_job_can_be_left_and_its_result_shown_later(shell: Shell) -> None:
    left = shell("scan", "activation", PROMPT, "--no-wait")
    job_id = left.out.strip()
    assert f"neural-mri result {job_id}" in left.err
    shown = shell("job", job_id)
    assert re.search(r"state +queued", shown.out)
    followed = shell("job", job_id, "--watch")
    assert re.search(r"state +succeeded", followed.out)
    result = shell("result", job_id, "--top", "1")
    assert "␣Paris" in result.out
    assert "␣France" not in result.out
    assert job_id in shell("jobs").out


def test_a_structural_scan_counts_parameters(shell: Shell, wire: Wire) -> None:
    said = shell("scan", "structural")
    assert asked_for(wire) == StructuralScan()
    assert "19,530 parameters" in said.out
    assert re.search(r"head +12 × +12,960 +66\.4%", said.out)
    assert re.search(r"1  unembed", said.out)


def test_an_attention_scan_says_where_the_last_token_looks(shell: Shell, wire: Wire) -> None:
    said = shell("scan", "attention", PROMPT, "--layer", "1,2-3", "--head", "2", "--top", "2")
    assert asked_for(wire) == AttentionScan(prompt=PROMPT, layers=(1, 2, 3))
    assert said.out.count("where token 4 ␣in looks") == 3
    assert re.search(r"H2 +0\.\d\d \d \S+ +0\.\d\d \d \S+$", said.out, re.MULTILINE)
    assert "H1" not in said.out


def test_a_service_that_is_down_fails_the_health_check(shell: Shell, wire: Wire) -> None:
    state = {"status": "down", "workers": [], "models": [{"name": "tiny", "queued": 3}]}
    wire.answers["GET", "/api/health"] = [json_answer(state, 503)] * 2
    said = shell("health")
    assert said.code == ExitCode.FAILED
    assert re.search(r"workers +none\s+models +tiny, 3 queued", said.out)
    assert msgspec.json.decode(shell("health", "--json").out) == state


def test_health_says_which_worker_holds_what(shell: Shell, wire: Wire) -> None:
    held = {"name": "tiny", "state": "resident", "memory_bytes": 542680576, "load_seconds": None}
    workers = [
        {"worker": "one@host", "device": "cpu", "models": [held], "at": 1795691862.4},
        {"worker": "two@host", "device": "cuda:0", "models": []},
    ]
    wire.answers["GET", "/api/health"] = [json_answer({"status": "ready", "workers": workers})]
    said = [line.split() for line in shell("health").out.splitlines()]
    assert said[1] == ["workers", "one@host", "on", "cpu:", "tiny", "resident"]
    assert said[2] == ["two@host", "on", "cuda:0:", "no", "model"]


def test_models_are_listed_with_their_shapes(shell: Shell) -> None:
    said = shell("models")
    assert re.search(r"tiny \(default\) +available, pinned +123,456 +4 × 3 +64", said.out)
    assert re.search(r"n_kv_heads +1", shell("model", "info").out)


def test_loading_and_unloading_are_followed_to_their_end(shell: Shell) -> None:
    assert shell("model", "load", "tiny").out == "tiny: load succeeded\n"
    assert shell("model", "unload", "tiny").out == "tiny: unload succeeded\n"
    left = shell("model", "load", "tiny", "--no-wait")
    assert left.out == "tiny: load queued\n"
    assert "--watch" in left.err


def test_tokens_are_shown_with_their_ids(shell: Shell) -> None:
    assert re.search(r"1 +11 +␣Eiffel", shell("tokenize", PROMPT).out)


def test_cancelling_says_where_the_job_stands(shell: Shell) -> None:
    job_id = shell("scan", "activation", PROMPT, "--no-wait").out.strip()
    assert f"job {job_id} stands at" in shell("cancel", job_id).out
    assert shell("job", job_id, "--watch").code == ExitCode.CANCELLED


def test_the_version_and_the_help_need_no_service(capsys: pytest.CaptureFixture[str]) -> None:
    shell = Shell(capsys)
    assert shell("--version").out == f"neural-mri {__version__}\n"
    page = " ".join(shell("--help").out.split())
    for code in ExitCode:
        assert re.search(rf"\b{int(code)}\b", page)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("scan", "activation", ""), "the prompt is empty"),
        (("scan", "activation", PROMPT, "--layers", "3-x"), "'3-x' is not an address"),
        (("scan", "activation", PROMPT, "--layers", "7-5"), "'7-5' runs backwards: expected 5-7"),
        (
            ("scan", "activation", PROMPT, "--tokens", "last"),
            "'last' is no list of token positions",
        ),
        (
            ("scan", "activation", PROMPT, "--aggregation", "sum"),
            "'sum' is no aggregation: expected",
        ),
        (("scan", "activation", PROMPT, "--top", "0"), "'0' is not a whole number from 1 to 100"),
        (("scan", "activation", PROMPT, "--plot", "x.gif"), "'x.gif' names no picture format"),
        (("scan", "activation", PROMPT, "--csv", "/no/x.csv"), "there is no folder /no"),
        (("scan", "activation", PROMPT, "--csv", "x.csv", "--no-wait"), "--no-wait leaves before"),
        (("scan", "attention", PROMPT), "Missing option '--layer'"),
        (("scan", "attention", PROMPT, "--layer", "embed"), "'embed' is no list of layers"),
        (("scan", "attention", PROMPT, "--layer", "1", "--head", "x"), "'x' is not a whole number"),
        (("scan", "telepathy"), "No such command 'telepathy'"),
        (("job", "7"), "'7' is not a job's id: expected a UUID"),
        (("sessions", "open", "http://[::1/#shared=" + "a" * 22), "this is no link: Invalid IPv6"),
        (("models", "--url", "nowhere"), "'nowhere' is not an address: expected something like"),
    ],
)
def test_bad_usage_is_one_sentence_that_names_the_value(
    shell: Shell, wire: Wire, arguments: tuple[str, ...], complaint: str
) -> None:
    said = shell(*arguments)
    assert said.code == ExitCode.USAGE
    assert complaint in said.err
    assert said.err.startswith("neural-mri: ")
    assert said.err.count("\n") == 1
    assert said.out == ""
    assert wire.asked == []


def test_a_refusal_is_the_services_own_sentence(shell: Shell, wire: Wire) -> None:
    problem = PromptTooLong("the prompt has 70 tokens, tiny reads 64", n_tokens=70)
    wire.answers["POST", "/api/scan/activation"] = [problem_answer(problem)]
    said = shell("scan", "activation", PROMPT, "--json")
    assert said == Said(
        ExitCode.FAILED, "", "neural-mri: the prompt has 70 tokens, tiny reads 64\n"
    )


def test_a_failed_scan_says_why(shell: Shell, wire: Wire) -> None:
    problem = {"detail": "the worker ran out of memory"}
    wire.next_end = Ended(state=JobState.FAILED, attempt=1, problem=problem)
    said = shell("scan", "activation", PROMPT)
    assert said.code == ExitCode.FAILED
    assert said.out == ""
    assert said.err.endswith("failed: the worker ran out of memory\n")


def test_a_head_that_is_not_there_is_refused(shell: Shell) -> None:
    said = shell("scan", "attention", PROMPT, "--layer", "1", "--head", "9")
    assert said.code == ExitCode.USAGE
    assert "head 9 does not exist: expected 0 to 2" in said.err


def test_a_file_that_cannot_be_written_is_named(shell: Shell, tmp_path: Path) -> None:
    said = shell("scan", "structural", "--quiet", "--arrow", str(tmp_path))
    assert said.code == ExitCode.USAGE
    assert f"cannot write {tmp_path}: Is a directory" in said.err


def test_a_model_that_said_more_than_we_know_is_listed_all_the_same(
    shell: Shell, wire: Wire
) -> None:
    wire.answers["GET", "/api/models"] = [json_answer([msgspec.to_builtins(MODEL) | {"x": 1}])]
    assert "tiny" in shell("models").out


def test_lists_tell_the_readers_own_time(
    shell: Shell, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = wire.submit(ActivationScan(prompt=PROMPT))
    job.view = msgspec.structs.replace(
        job.view, created_at=datetime(2026, 11, 26, 23, 30, 15, tzinfo=UTC)
    )
    monkeypatch.setenv("TZ", "Asia/Seoul")
    time.tzset()
    try:
        assert "2026-11-27 08:30:15" in shell("jobs").out
    finally:
        monkeypatch.undo()
        time.tzset()


def test_jobs_are_listed_by_their_state(shell: Shell, wire: Wire) -> None:
    assert msgspec.json.decode(shell("jobs", "--state", "failed", "--json").out) == []
    assert wire.asked[-1].query["state"] == "failed"
    refused = shell("jobs", "--state", "done")
    assert refused.code == ExitCode.USAGE
    assert "'done' is none: expected queued, " in refused.err


def test_how_long_to_wait_for_an_answer_is_said_before_the_command(
    shell: Shell, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NMRI_PATIENCE", "0")
    late = json_answer([MODEL])._replace(seconds=0.3)
    wire.answers["GET", "/api/models"] = [late, late]
    said = shell("--timeout", "0.1", "models")
    assert said.code == ExitCode.UNREACHABLE
    assert "it took longer than 0.1 s): what was asked may still be done" in said.err
    monkeypatch.setenv("NMRI_TIMEOUT", "0.1")
    assert shell("models").code == ExitCode.UNREACHABLE
    assert shell("--timeout", "0", "models").code == ExitCode.USAGE
    monkeypatch.delenv("NMRI_TIMEOUT")
    assert shell("models").code == ExitCode.DONE
