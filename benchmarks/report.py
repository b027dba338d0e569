"""Makes ratios and a Markdown table of measured values."""

from __future__ import annotations

import statistics
from typing import Any

Values = list[float | None]


def paired_ratio(
    ours: Values, theirs: Values, more_is_better: bool = False
) -> float | None:
    """Returns how many times better ours is: the median of the rounds' ratios.

    The two values of a round were measured close together, so that ratios of rounds
    vary less than the ratio of two medians.

    Args:
        ours: a value for each round, `None` where there is none.
        theirs: a value for each round, `None` where there is none.
        more_is_better: whether larger values are better.

    Returns:
        The ratio, or `None` if there is no round with both.

    Example:

    >>> from benchmarks.report import paired_ratio
    >>> paired_ratio([1.0, 2.0, None], [3.0, 8.0, 5.0])
    3.5
    """
    pairs = [(x, y) for x, y in zip(ours, theirs) if x and y]
    if not pairs:
        return None
    ratios = [x / y if more_is_better else y / x for x, y in pairs]
    return statistics.median(ratios)


def median(values: Values) -> float | None:
    """Returns the median of the values that are not `None`."""
    found = [x for x in values if x is not None]
    return statistics.median(found) if found else None


def opponents(row: dict[str, Any], ours: str) -> dict[str, str]:
    """Returns the contestants that one of our backends is compared with, by library.

    KerasHub on the same backend (on TensorFlow the faster of its default and XLA in
    this row) and transformers.
    """
    values = row["values"]
    backend = ours.split("/")[1]
    found = {}
    rivals = [
        name
        for name in (f"keras_hub/{backend}", f"keras_hub/{backend}-xla")
        if median(values.get(name, [])) is not None
    ]
    if rivals:
        choose = max if row["more_is_better"] else min
        found["keras_hub"] = choose(rivals, key=lambda name: median(values[name]))
    if median(values.get("transformers/torch", [])) is not None:
        found["transformers"] = "transformers/torch"
    return found


def ratios(row: dict[str, Any]) -> dict[str, dict[str, tuple[str, float]]]:
    """Returns, by our backend and the other library, the contestant and the ratio."""
    if row["void"] or not row.get("comparable", True):
        return {}
    found: dict[str, dict[str, tuple[str, float]]] = {}
    for ours, values in row["values"].items():
        if not ours.startswith("ours/"):
            continue
        found[ours] = {}
        for library, name in opponents(row, ours).items():
            ratio = paired_ratio(values, row["values"][name], row["more_is_better"])
            if ratio is not None:
                found[ours][library] = (name, ratio)
    return found


def number(value: float) -> str:
    """Returns a number with about three digits."""
    if value >= 1000:
        return f"{value:.0f}"
    digits = 3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f}"


def cell(row: dict[str, Any], name: str) -> str:
    """Returns the median of a contestant's values, with the least and the most."""
    if name in row["errors"]:
        return "error"
    values = [x for x in row["values"].get(name, []) if x is not None]
    if not values:
        return "–"
    if all(isinstance(x, int) for x in values):
        return str(values[0])
    factor = 100 if row["unit"] == "%" else 1
    middle, least, most = (
        number(x * factor)
        for x in (statistics.median(values), min(values), max(values))
    )
    if len(values) == 1:
        return middle
    return f"{middle} ({least}–{most})"


def ratio_cell(found: dict, ours: str, library: str) -> str:
    """Returns a ratio, with a mark where KerasHub used XLA."""
    if library not in found.get(ours, {}):
        return "–"
    name, ratio = found[ours][library]
    return f"{ratio:.2f}x{' (XLA)' if name.endswith('-xla') else ''}"


def goal_text(row: dict[str, Any]) -> str:
    """Returns the goals of a row, and whether each of our backends meets them."""
    found, texts = ratios(row), []
    for goal in row["goals"]:
        at_most, at_least = goal["at_most"], goal["at_least"]
        against = goal["against"]
        text = f"<= {at_most:g}" if at_most is not None else f"{at_least:g}"
        if against:
            text += f"x {against}"
        elif at_most is None:
            text = f">= {at_least:.0%}" if row["unit"] == "%" else f">= {at_least:g}"
        verdicts = []
        for ours, values in row["values"].items():
            library, backend = ours.split("/")
            wanted = goal.get("backends") or [backend]
            if library != "ours" or row["void"] or backend not in wanted:
                continue
            if against:
                value = found.get(ours, {}).get(against, (None, None))[1]
                if value is not None and at_most is not None:
                    value = 1 / value
            else:
                value = median(values)
            if value is not None:
                met = value <= at_most if at_most is not None else value >= at_least
                verdicts.append(f"{backend} {'met' if met else 'MISSED'}")
        texts.append(f"{text}: {', '.join(verdicts) or 'not measured'}")
    if texts and any(note.startswith("BUSY MACHINE") for note in row["notes"]):
        texts.append("not reliable: BUSY MACHINE")
    return "; ".join(texts)


def table(report: dict[str, Any], title: str, method: str) -> str:
    """Returns the report as Markdown.

    Args:
        report: the content of the JSON file.
        title: of the report.
        method: what all contestants did, in a few words.
    """
    settings = report["settings"]
    contestants = settings["contestants"]
    mine = [name for name in contestants if name.startswith("ours/")]
    columns = [
        (ours, library)
        for ours in mine
        for library in ("keras_hub", "transformers")
        if any(name.startswith(library) for name in contestants)
    ]
    lines = [f"# {title}" + (" (QUICK: small models)" if settings["quick"] else "")]
    lines += ["", *machine_lines(report), ""]
    lines += [
        f"{settings['dtype']}, {method}, random weights, the same for all. The median "
        "of the rounds (least–most). A ratio says how many times better ours is than "
        "the other: the median of the rounds' ratios; on TensorFlow against the "
        "faster of KerasHub's default and XLA.",
    ]
    if settings["quick"]:
        lines[-1] += " The goals are those of the full sizes."
    models = dict.fromkeys(row["model"] for row in report["rows"])
    for model in models:
        rows = [row for row in report["rows"] if row["model"] == model]
        head = ["case", "metric", *contestants]
        head += [f"{ours.split('/')[1]}: vs {library}" for ours, library in columns]
        head.append("goal")
        quick = "QUICK: " if settings["quick"] else ""
        lines += ["", f"## {quick}{model}", "", join(head), join(["---"] * len(head))]
        notes: list[str] = []
        for row in rows:
            unit = f" [{row['unit']}]" if row["unit"] else ""
            found = ratios(row)
            cells = [row["case"], row["metric"] + unit]
            if row["void"]:
                cells += ["void"] * len(contestants)
            else:
                cells += [cell(row, name) for name in contestants]
            cells += [ratio_cell(found, *column) for column in columns]
            lines.append(join([*cells, goal_text(row)]))
            errors = [f"{name}: {text}" for name, text in row["errors"].items()]
            void = [row["void"]] if row["void"] else []
            for text in (*void, *row["notes"], *errors):
                note = f"- {row['case']}: {text}"
                if note not in notes:
                    notes.append(note)
        lines += ["", *notes] if notes else []
    return "\n".join(lines) + "\n"


def join(cells: list[str]) -> str:
    """Returns a line of a Markdown table."""
    return "| " + " | ".join(text.replace("|", "/") for text in cells) + " |"


def machine_lines(report: dict[str, Any]) -> list[str]:
    """Returns lines about the machine and the versions of packages."""
    machine, settings = report["machine"], report["settings"]
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items())
    variables = ", ".join(f"{k}={v}" for k, v in machine["variables"].items())
    load = " ".join(f"{x:.1f}" for x in machine["load_average"])
    lines = [
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']:.0f} "
        f"GiB, {machine['system']}; device {settings['device']}"
        f"{(machine.get('gpu') and ' (' + machine['gpu'] + ')') or ''}; load average "
        f"before {load}. Python {machine['python']}, {versions}. "
        f"{settings['rounds']} rounds, {report['minutes']:.1f} minutes"
        f"{'' if report['finished'] else ', NOT FINISHED'}."
    ]
    return lines + ([f"Environment: {variables}."] if variables else [])
