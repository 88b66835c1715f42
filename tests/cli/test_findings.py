"""The commands for weights, circuits, anomalies and stimulation: what they ask, print and refuse."""

import inspect
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from neural_mri.cli import scans
from neural_mri.cli.app import app
from neural_mri.cli.exits import ExitCode
from neural_mri.contract.jobs import JobView
from neural_mri.contract.perturbations import (
    Amplify,
    Inject,
    InjectMode,
    Invert,
    MeanAblation,
    Noise,
    Patch,
    PatchSite,
    TraceKind,
    ZeroAblation,
)
from neural_mri.contract.scans import (
    AnomalyScan,
    CalibrationScan,
    CircuitScan,
    PatchingScan,
    PerturbationScan,
    TracingScan,
    WeightScan,
    decode_scan,
)
from tests.cli.test_commands import PROMPT, Shell
from tests.cli.test_process import ran
from tests.client.specimens import SCAN_KEY
from tests.client.wire import Wire

UNKNOWN = "01a21790-3674-79be-94ed-287ed744bafa"
COMMANDS = {
    "weights": ("scan", "weights"),
    "circuits": ("scan", "circuits", PROMPT),
    "anomaly": ("scan", "anomaly", PROMPT),
    "perturb": ("perturb", PROMPT, "--zero", "blocks.1.attn.h2"),
    "patching": ("patching", PROMPT, "--corrupt", "x"),
    "trace": ("trace", PROMPT, "--subject", "Eiffel"),
    "calibrate": ("calibrate",),
}


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str], wire: Wire) -> Shell:
    return Shell(capsys)


def asked_for(wire: Wire) -> Any:
    (body,) = [asked.body for asked in wire.asked if asked.method == "POST"]
    return decode_scan(body)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_prints_json_or_leaves_files_or_a_jobs_id(
    shell: Shell, wire: Wire, tmp_path: Path, name: str
) -> None:
    said = shell(*COMMANDS[name], "--json")
    assert (said.code, said.err) == (ExitCode.DONE, "")
    assert msgspec.json.decode(said.out, type=JobView).state.value == "succeeded"
    arrow, table = tmp_path / "a.arrow", tmp_path / "a.csv"
    files = shell(*COMMANDS[name], "-q", "--arrow", str(arrow), "--csv", str(table))
    assert files == (ExitCode.DONE, "", "")
    assert arrow.stat().st_size > 0
    assert table.stat().st_size > 0
    left = shell(*COMMANDS[name], "--no-wait", "-q")
    assert left.out.strip() == str(list(wire.jobs)[-1])


@pytest.mark.parametrize("name", COMMANDS)
def test_every_commands_help_shows_an_example_of_itself(shell: Shell, name: str) -> None:
    page = " ".join(
        shell(*COMMANDS[name][: 2 if COMMANDS[name][0] == "scan" else 1], "--help").out.split()
    )
    command = " ".join(COMMANDS[name][: 2 if COMMANDS[name][0] == "scan" else 1])
    assert page.count(f"neural-mri {command} ") >= 2


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        (
            "weights",
            (
                r"T2 · tiny",
                r"1  L3 MLP +0\.5",
                r"1  blocks\.2\.mlp W_out\[7, 1\] +-3\.5 +-88\.0 σ",
                r"1  L0H2 +0\.5",
                r"RMS weight, linear",
            ),
        ),
        (
            "circuits",
            (
                r"Next token after token 4 ␣in: ␣Paris",
                r"log p\(answer\) -0\.5 nats, p 0\.7000",
                r"change of log p\(answer\) when replaced \(mean; below 0 it helps; nats\)",
                r"1  L3 MLP +-4  measured  █+",
                r"5  L3H2 +\+0\.42  estimate  █+",
                r"10  L2H0",
                r"1  L1H2 → L3 MLP +-0\.75",
            ),
        ),
        (
            "anomaly",
            (
                r"answer  ␣Paris  log p -0\.400 +gain \+8\.60 nats +support -3\.00 +unsupported",
                r"0 The +not measured",
                r"3 ␣is +␣Paris +0\.500 +4\.50 +2 +\+0\.50 *$",
                r"4 ␣in +␣Paris +0\.500 +5\.50 +2 +-3\.00 +uncertain, unsupported, lens x1",
            ),
        ),
        (
            "perturb",
            (
                r"1  ␣Paris +0\.700  ␣the +0\.600",
                r"log p\(answer\) +-0\.5 +→ +-4  nats ± 0\.25 over 8 draws",
                r"D_KL\(clean, perturbed\) +2  nats",
                r"1  L3H2 +12\.4",
            ),
        ),
        (
            "patching",
            (
                r"clean -0\.5, corrupted -4 nats; p 0\.7000, 0\.0200",
                r"largest \(recovery, share of the gap\)",
                r"2  layer 3 at 4 ␣in +1\.0000  MLP",
                r"L3 [▁▂▃▄▅▆▇█]{5}$",
            ),
        ),
        (
            "trace",
            (
                r"largest \(indirect effect, probability\)",
                r"layer 3 at 4 ␣in +1\.0000  attention",
                r"token 0",
            ),
        ),
        (
            "calibrate",
            (rf"--calibration {SCAN_KEY}", r"bias  D_KL\(model, lens\).* +2\.9 +6\.5 +10\.1"),
        ),
    ],
)
def test_a_report_says_first_what_a_person_wants_to_know(
    shell: Shell, name: str, lines: tuple[str, ...]
) -> None:
    said = shell(*COMMANDS[name])
    assert (said.code, said.err) == (ExitCode.DONE, "")
    for line in lines:
        assert re.search(line, said.out, re.MULTILINE), line


def test_scans_are_asked_for_as_they_were_typed(shell: Shell, wire: Wire, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A text.")
    about = ("--answer", " Paris", "--foil", " Rome", "--at", "-2")
    asked = {"answer": " Paris", "foil": " Rome", "target_token_idx": -2}
    given: list[tuple[tuple[str, ...], object]] = [
        (
            ("scan", "weights", "--layers", "1", "--baseline", "tiny", "--sigma", "4"),
            WeightScan(
                layers=("blocks.1.attn", "blocks.1.mlp"), baseline="tiny", outlier_sigma=4.0
            ),
        ),
        (
            *(("scan", "circuits", PROMPT, *about, "--corrupt", "x", "--edges", "0"),),
            CircuitScan(prompt=PROMPT, corrupt_prompt="x", edges=0, **asked),  # type: ignore[arg-type]
        ),
        (
            *(("scan", "anomaly", PROMPT, *about, "--lens", "raw", "--tokens", "target"),),
            AnomalyScan(prompt=PROMPT, lens="raw", token_positions="target", **asked),  # type: ignore[arg-type]
        ),
        (
            *(("patching", PROMPT, "--corrupt", "x", "--site", "head", "--site", "mlp"),),
            PatchingScan(prompt=PROMPT, corrupt_prompt="x", sites=(PatchSite.HEAD, PatchSite.MLP)),
        ),
        (
            *(("trace", PROMPT, "--subject", "Eiffel", "--kind", "mlp", "--window", "3"),),
            TracingScan(prompt=PROMPT, subject="Eiffel", kinds=(TraceKind.MLP,), window=3),
        ),
        (
            ("calibrate", str(text), "--lens", "bias", "--lens", "ridge", "--n-tokens", "300"),
            CalibrationScan(texts=("A text.",), lenses=("bias", "ridge"), n_tokens=300),  # type: ignore[arg-type]
        ),
    ]
    for arguments, expected in given:
        wire.asked.clear()
        assert shell(*arguments, "-q").code == ExitCode.DONE
        assert asked_for(wire) == expected


def test_every_operation_is_read_with_its_positions_and_amounts(
    shell: Shell, wire: Wire, tmp_path: Path
) -> None:
    numbers = tmp_path / "values.json"
    numbers.write_text("[1.5,\n -2]")
    said = shell(
        *("perturb", PROMPT, "-q", "--tokens", "-1", "--draws", "3", "--seed", "7"),
        *("--noise", "blocks.1.mlp=0.5", "--zero", "blocks.1.attn.h2", "--zero", "embed@0,2"),
        *("--amplify", "blocks.3.mlp=-3", "--amplify", "blocks.2.mlp", "--invert", "blocks.0.attn"),
        *("--ablate", "blocks.2.attn@1", "--inject", "blocks.1.mlp.n4=5"),
        *("--replace", f"blocks.1.attn.h0=@{numbers}", "--patch", "blocks.2.resid_post"),
        *("--source", "Another prompt", "--no-activations"),
    )
    assert (said.code, said.err) == (ExitCode.DONE, "")
    last = (-1,)
    assert asked_for(wire) == PerturbationScan(
        prompt=PROMPT,
        perturbed_scan=False,
        perturbations=(
            ZeroAblation(component="blocks.1.attn.head_2", token_positions=last),
            ZeroAblation(component="embed", token_positions=(0, 2)),
            Amplify(component="blocks.3.mlp", factor=-3.0, token_positions=last),
            Amplify(component="blocks.2.mlp", token_positions=last),
            Invert(component="blocks.0.attn", token_positions=last),
            Noise(component="blocks.1.mlp", sigma=0.5, draws=3, seed=7, token_positions=last),
            MeanAblation(component="blocks.2.attn", token_positions=(1,)),
            Inject(component="blocks.1.mlp.neuron_4", values=(5.0,), token_positions=last),
            Inject(
                component="blocks.1.attn.head_0",
                values=(1.5, -2.0),
                mode=InjectMode.REPLACE,
                token_positions=last,
            ),
            Patch(
                component="blocks.2.resid_post",
                source_prompt="Another prompt",
                token_positions=last,
            ),
        ),
    )


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("perturb", PROMPT, "--zero", "blocks.1.foo"), "--zero: 'blocks.1.foo' is not an address"),
        (("perturb", PROMPT, "--zero", "embed=1"), "'embed=1' has a value after its address"),
        (("perturb", PROMPT, "--zero", "embed@x"), "--zero: 'x' is no list of token positions"),
        (
            ("perturb", PROMPT, "--amplify", "embed=lots"),
            "'lots' in 'embed=lots' is not a number from -1e+06 to 1e+06",
        ),
        (("perturb", PROMPT, "--noise", "embed=-1"), "is not a number from 0 to 1000"),
        (("perturb", PROMPT, "--inject", "embed"), "names no values: expected embed=0.5,1"),
        (("perturb", PROMPT, "--inject", "embed=1,x"), "'1,x' holds what is no number"),
        (("perturb", PROMPT, "--replace", "embed=nan"), "expected numbers from -1e6 to 1e6"),
        (("perturb", PROMPT, "--inject", "embed=@/no/file"), "cannot read /no/file"),
        (("perturb", PROMPT, "--patch", "embed"), "'embed' is patched from no prompt"),
        (("perturb", PROMPT, "--source", "x"), "expected --patch as well"),
        (("trace", PROMPT, "--subject", "Louvre"), "'Louvre' does not stand in the prompt"),
        (("trace", PROMPT, "--subject", "Eiffel", "--sigma", "x"), "'x' is not a number from"),
        (("trace", PROMPT, "--subject", "Eiffel", "--kind", "x"), "'x' is none: expected state"),
        (("scan", "circuits", PROMPT, "--method", "x"), "'x' is none: expected fast, ablation"),
        (("scan", "anomaly", PROMPT, "--calibration", "x"), "'x' is no calibration's key"),
        (("scan", "weights", "--sigma", "0"), "'0' is not a number from 1 to 1000"),
        (("patching", PROMPT), "Missing option '--corrupt'"),
        (("scan", "circuits", PROMPT, "--answer", ""), "the text is empty: expected a token"),
        (("scan", "activation", PROMPT, "--lane", "x"), "'--lane': 'x' is not one of"),
        (("sessions", "share", UNKNOWN, "--access", "x"), "'x' is none: expected read, fork"),
        (("sessions", "rename", UNKNOWN, ""), "the name is empty: expected text"),
        (("sessions", "revoke", UNKNOWN, "x"), "not a link's id: expected 12 hexadecimal"),
        (("report", "/no/file"), "/no/file: No such file"),
        (("calibrate", "/no/file"), "cannot read /no/file"),
    ],
)
def test_bad_usage_is_one_sentence_that_names_the_value(
    shell: Shell, wire: Wire, arguments: tuple[str, ...], complaint: str
) -> None:
    said = shell(*arguments)
    assert said.code == ExitCode.USAGE
    assert complaint in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""
    assert wire.asked == []


def test_estimates_are_shown_while_a_circuit_is_measured_and_then_replaced(wire: Wire) -> None:
    said = ran("scan", "circuits", PROMPT, FORCE_COLOR="1", TERM="xterm-256color")
    assert re.search(rb"L1H2 .*\+0\.2200 nats  estimate", said.stderr)
    assert re.search(rb"L3 MLP .*-4\.0000 nats  measured", said.stderr)
    assert b"Embed" not in said.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("scan", "activation", PROMPT),
        ("scan", "attention", PROMPT, "--layer", "1"),
        ("scan", "circuits", PROMPT),
        ("scan", "anomaly", PROMPT),
        ("perturb", PROMPT, "--zero", "blocks.1.attn.h2"),
    ],
)
def test_what_can_share_a_forward_can_be_asked_to_have_its_own(
    shell: Shell, wire: Wire, arguments: tuple[str, ...]
) -> None:
    assert shell(*arguments, "-q", "--canonical").code == ExitCode.DONE
    assert asked_for(wire).canonical
    assert asked_for(wire).shared_forward is None


def test_every_command_that_scans_has_the_same_options_after_its_own() -> None:
    common = ["lane", "top", "as_json", "arrow", "csv", "plot", "no_wait", "quiet", "url"]
    found = {}
    for group in (app, scans.commands):
        for each in group.registered_commands:
            assert each.callback is not None
            names = list(inspect.signature(each.callback).parameters)
            if "lane" in names:
                found[each.callback.__name__] = names[-len(common) :]
    assert set(found) >= {"structural", "circuits", "perturb", "patching", "trace", "calibrate"}
    assert all(names == common for names in found.values())
