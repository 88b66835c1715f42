"""A diagnosis as one HTML page that needs nothing beside itself: no script, no font, no address."""

from collections.abc import Iterator, Sequence
from html import escape
from importlib import resources

from neural_mri import __version__
from neural_mri.contract.findings import Diagnosis, Finding, Grid, Severity, Trajectory
from neural_mri.diagnostics.phrasing import Phrases, number
from neural_mri.diagnostics.pictures import curves, heat_map, intervals
from neural_mri.diagnostics.reports.wording import case_unit, checkpoint, legible, verdict

__all__ = ("html",)

_PICTURES = {
    "norms change": "picture_norms",
    "attention change": "picture_attention",
    "attribution": "picture_attribution",
}


def html(diagnosis: Diagnosis, phrases: Phrases) -> str:
    """The page."""
    style = (resources.files("neural_mri.diagnostics") / "reports" / "page.css").read_text("utf-8")
    title = f"Neural MRI · {phrases('title')} · {diagnosis.candidate.model}"
    return legible(
        f'<!doctype html>\n<html lang="{phrases.language.value}">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; style-src '
        "'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        + "\n".join(_body(diagnosis, phrases))
        + "\n</body>\n</html>\n"
    )


def _body(diagnosis: Diagnosis, phrases: Phrases) -> Iterator[str]:
    yield _header(diagnosis, phrases)
    yield "<main>"
    yield _counts(diagnosis, phrases)
    norms = [grid for grid in diagnosis.grids if grid.name == "norms change"]
    yield from (_picture(grid, phrases) for grid in norms)
    if diagnosis.gates:
        yield _gates(diagnosis, phrases)
    yield _findings(diagnosis, phrases)
    yield _cases(diagnosis, phrases)
    yield f"<h2>{escape(phrases('inside'))}</h2>"
    yield from (_picture(grid, phrases) for grid in diagnosis.grids if grid not in norms)
    yield _lenses(diagnosis.trajectories, phrases)
    yield "</main>"
    yield (
        f"<footer><p>{escape(phrases('foot'))}</p><p>Neural MRI {__version__} · "
        f"{escape(diagnosis.suite)} {diagnosis.suite_version} · {diagnosis.suite_digest[:16]}</p></footer>"
    )


def _header(diagnosis: Diagnosis, phrases: Phrases) -> str:
    state = (
        "none"
        if diagnosis.baseline is None and diagnosis.passed
        else "passed"
        if diagnosis.passed
        else "failed"
    )
    subject = diagnosis.candidate
    rows = [
        (phrases("candidate"), checkpoint(subject)),
        *([(phrases("baseline"), checkpoint(diagnosis.baseline))] if diagnosis.baseline else []),
        (phrases("suite"), f"{phrases.of(diagnosis.suite_title)} {diagnosis.suite_version}"),
        (
            phrases("numerics"),
            f"{subject.numerics.dtype} · {subject.numerics.device} · {subject.numerics.attention}",
        ),
        (
            phrases("weights"),
            f"{subject.n_parameters:,} · {subject.family} · {subject.n_layers} × {subject.n_heads}",
        ),
        (phrases("made"), diagnosis.created_at.strftime("%Y-%m-%d %H:%M UTC")),
    ]
    listed = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in rows
    )
    return (
        '<header><div class="brand"><span class="lamp"></span><div><strong>NEURAL MRI</strong>'
        "<small>Model Resonance Imaging</small></div></div>"
        f'<div class="verdict {state}"><small>{escape(phrases("title"))}</small>'
        f"<b>{escape(verdict(diagnosis, phrases))}</b></div><dl>{listed}</dl></header>"
    )


def _counts(diagnosis: Diagnosis, phrases: Phrases) -> str:
    found = dict.fromkeys(Severity, 0)
    for finding in diagnosis.findings:
        found[finding.severity] += 1
    boxes = [
        (
            number(count),
            phrases(f"{'severity' if count == 1 else 'severities'}_{severity.value}"),
            severity.value,
        )
        for severity, count in found.items()
    ]
    asked = sum(case.asked for case in diagnosis.cases)
    boxes.append((str(asked), phrases("prompts"), "plain"))
    boxes.append((str(len(diagnosis.cases)), phrases("cases"), "plain"))
    inside = "".join(
        f'<div class="{kind}"><b>{escape(value)}</b><span>{escape(name)}</span></div>'
        for value, name, kind in boxes
    )
    return f'<section class="counts">{inside}</section>'


def _picture(grid: Grid, phrases: Phrases) -> str:
    key = _PICTURES[grid.name]
    title = phrases(key)
    return (
        f'<figure><h3>{escape(title)}</h3><div class="film">{heat_map(grid, title, phrases)}</div>'
        f"<figcaption>{escape(phrases(key + '_about'))} {escape(phrases.unit(grid.unit))}</figcaption></figure>"
    )


def _gates(diagnosis: Diagnosis, phrases: Phrases) -> str:
    heads = ("measure", "outcome", "changed", "largest", "noise", "p_value", "where")
    rows = []
    for gate in diagnosis.gates:
        kind = "passed" if gate.severity is None else gate.severity.value
        cells = (
            f"{gate.changed} / {gate.tested}",
            phrases.quantity(gate.largest, gate.unit),
            number(gate.noise),
            number(gate.p_value),
            phrases.place(gate.where, diagnosis),
        )
        rows.append(
            f"<tr><th scope=row>{escape(phrases.measure(gate.measure.value))}</th>"
            f'<td><span class="tag {kind}">{escape(phrases.severity(gate.severity))}</span></td>'
            + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
            + "</tr>"
        )
    about = phrases("gates_about", tests=diagnosis.tests, alpha=number(diagnosis.alpha))
    return (
        f"<h2>{escape(phrases('gates'))}</h2><p class=about>{escape(about)}</p><div class=wide><table><thead><tr>"
        + "".join(f"<th scope=col>{escape(phrases(head))}</th>" for head in heads)
        + f"</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _findings(diagnosis: Diagnosis, phrases: Phrases) -> str:
    cards = "".join(
        _finding(finding, diagnosis, phrases, opened=not place)
        for place, finding in enumerate(diagnosis.findings)
    )
    return f"<h2>{escape(phrases('findings'))}</h2>" + (
        cards or f"<p class=about>{escape(phrases('none'))}</p>"
    )


def _finding(finding: Finding, diagnosis: Diagnosis, phrases: Phrases, *, opened: bool) -> str:
    said = phrases.say(finding, diagnosis)
    kind = finding.severity.value
    lines = "".join(
        f"<div><dt>{escape(phrases(name))}</dt><dd>{escape(text)}</dd></div>"
        for name, text in (
            ("means", said.means),
            ("means_not", said.means_not),
            ("next", said.next),
            ("evidence", said.evidence),
        )
    )
    prompt = ""
    if finding.evidence.prompt:
        prompt = f"<div><dt>{escape(phrases('prompt'))}</dt><dd><q>{escape(finding.evidence.prompt)}</q></dd></div>"
    return (
        f'<details class="finding {kind}"{" open" if opened else ""}><summary><span class="tag {kind}">'
        f"{escape(phrases.severity(finding.severity))}</span><b>{escape(said.title)}</b>"
        f"<span class=text>{escape(said.text)}</span></summary><dl>{lines}{prompt}</dl></details>"
    )


def _cases(diagnosis: Diagnosis, phrases: Phrases) -> str:
    compared = diagnosis.baseline is not None
    heads = [
        "case",
        "score",
        *(["before", "change"] if compared else []),
        "carriers",
        "settles",
        "support",
    ]
    rows = []
    for case in diagnosis.cases:
        unit = case_unit(case)
        aside = (
            f"<small>{escape(phrases('set_aside', count=case.set_aside))}</small>"
            if case.set_aside
            else ""
        )
        cells = [
            phrases.score(case.score, unit),
            *(
                [phrases.score(case.baseline, unit), phrases.score(case.change, unit)]
                if compared
                else []
            ),
            ", ".join(f"{each.label} {number(each.effect.value)}" for each in case.carriers[:3])
            or "–",
            phrases.score(case.settles, "share of layers"),
            phrases.score(case.support, ""),
        ]
        rows.append(
            f"<tr><th scope=row>{escape(phrases.of(case.title))}<small>{escape(phrases.of(case.about))}</small>"
            f"<small class=source>{escape(case.source)} · {escape(case.licence)}</small>{aside}</th>"
            + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
            + "</tr>"
        )
    return (
        f"<h2>{escape(phrases('cases'))}</h2><figure><div class=film>{intervals(diagnosis.cases, phrases)}</div>"
        f"<figcaption>{escape(phrases('interval'))} · ┊ {escape(phrases('chance'))}"
        + (f" · ◇ {escape(phrases('before'))}" if compared else "")
        + "</figcaption></figure><div class=wide><table class=cases><thead><tr>"
        + "".join(f"<th scope=col>{escape(phrases(head))}</th>" for head in heads)
        + f"</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _lenses(trajectories: Sequence[Trajectory], phrases: Phrases) -> str:
    figures = []
    for name, key in (("answer_log_probability", "picture_answer"), ("kl", "picture_kl")):
        mine = [each for each in trajectories if each.name.endswith(f" {name}")]
        if not mine:
            continue
        legend = "".join(
            f'<span class="key k{index}">{escape(phrases(each.name.partition(" ")[0]))}</span>'
            for index, each in enumerate(mine)
        )
        figures.append(
            f"<figure><h3>{escape(phrases(key))}</h3><div class=film>{curves(mine, phrases(key))}</div>"
            f"<figcaption>{legend} nats · {escape(phrases('layer'))} · {escape(phrases('median'))}"
            "</figcaption></figure>"
        )
    return f'<section class="pair">{"".join(figures)}</section>'
