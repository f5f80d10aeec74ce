"""What a merge says at its end: one block of a few lines, however many models it has."""

from __future__ import annotations

import os
import re
import shlex
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from mergekit_pave.core.reasons import FEW_TOKENS, NEVER_CALLED, UNCHANGED
from mergekit_pave.report.closed_form import mean_alignments, share
from mergekit_pave.report.emr import restore_command, restore_names, size
from mergekit_pave.report.outputs import EMR_FOLDER, REPORT_NAME
from mergekit_pave.report.places import short_models
from mergekit_pave.report.summary import by_model, kind, mean_errors, num_purified, reasons_in_a_line
from mergekit_pave.report.tables import MERGED_BY, told_apart

_MOST = 10  # lines
_NAMED = 2  # kinds of tensors that a line names
_COLUMN = 14  # where what a line says begins, after two spaces and a word

# Why weights that could have been purified stay as they are, in the words of the block.
_LEFT = {NEVER_CALLED: NEVER_CALLED, UNCHANGED: UNCHANGED, FEW_TOKENS: "of experts that saw too few tokens"}


def account(report: dict[str, Any], out_path: str, following: str) -> str:
    """The block: what was done to how many tensors, the figures that matter, warnings, and where to go from here.

    Args:
        report: the finished one.
        following: the command to type next.

    Returns:
        At most ten lines. Models have a line each where there is room, else one for all of them.
    """
    lines = [("regmean", text) for text in _regmean(report)]
    lines += [("vocabulary", text) for text in _vocabulary(report)]
    lines += [("refined", text) for text in _refined(report)]
    lines += [("left alone", text) for text in _left(report)]
    if "emr" in report:
        lines.append(("restore", _restore(report["emr"], out_path)))
    if count := len(report["warnings"]):
        lines.append(("warnings", f"{count}: see above, and the report"))
    page = shlex.join(["mergekit-pave", "report", out_path])
    lines += [("report", f"{os.path.join(out_path, REPORT_NAME)}; as a page: {page}")]
    if following != page:
        lines += [("next", following)]
    emr = _emr(report, out_path, room=_MOST - 1 - len(lines) - bool(report["purified"]))
    lines = emr + lines
    purified = _purified(report, room=_MOST - 1 - len(lines))
    head = f"PAVE: {out_path} is merged"
    return "\n".join([head, *(f"  {word:{_COLUMN - 2}}{text}" for word, text in purified + lines)])


def _purified(report: dict[str, Any], room: int) -> list[tuple[str, str]]:
    """
    Args:
        room: lines that it may take.
    """
    sums = by_model(report)
    if not sums:
        return []
    names = short_models(report["models"])
    total = f"{num_purified(report)} of {report['tensors']} tensors"
    if len(sums) < room:
        width = max(len(names[model]) for model in sums)
        return [("purified", total)] + [("", f"{names[model]:{width}}  {_effect(of_model)}") for model, of_model in sums.items()]
    kept = {names[model]: of_model["mean_kept"] for model, of_model in sums.items()}
    ratios = {names[model]: of_model["removed_over_change"] for model, of_model in sums.items()}
    text = f"{total} of {len(sums)} models, which keep {_range(kept, lambda share: f'{100 * share:.1f} %')} of their rank"
    known = {name: ratio for name, ratio in ratios.items() if ratio is not None}
    if known:
        above = sum(ratio > 1 for ratio in known.values())
        text += f"; removed {_range(known, lambda ratio: f'{ratio:.2g} x')} their change" + (
            f", in {above} above 1 x" * bool(above)
        )
    return [("purified", text)]


def _effect(sums: dict[str, Any]) -> str:
    """On one model."""
    text = f"kept {100 * sums['mean_kept']:.1f} % of its rank"
    if (ratio := sums["removed_over_change"]) is not None:
        text += f", removed {ratio:.2g} x its change"
        if sums["exceeding"]:
            text += f" (more than it in {sums['exceeding']} of {sums['tensors']} tensors)"
    return text


def _emr(report: dict[str, Any], out_path: str, room: int) -> list[tuple[str, str]]:
    """
    Args:
        room: lines that it may take.
    """
    if "emr" not in report:
        return []
    emr = report["emr"]
    models, names = emr["models"], short_models(emr["models"])
    text = f"{emr['tensors']} of {report['tensors']} tensors shared through masks; "
    text += f"{_count(len(models), 'file')} of {size(emr)} in {os.path.join(out_path, EMR_FOLDER)}"
    if len(models) < room:
        width = max(map(len, names.values()))
        return [("emr", text)] + [("", f"{names[model]:{width}}  {_restored(of)}") for model, of in models.items()]
    distances = {names[model]: of["distance"] for model, of in models.items() if of["distance"] is not None}
    if distances:
        text += f"; restored, they differ by {_range(distances, lambda distance: f'{distance:.2g} x')} their change"
    if own := sum(len(of["own"]) for of in models.values()):
        text += f"; {_count(own, 'tensor')} of their own kept"
    return [("emr", text)]


def _restored(of_model: dict[str, Any]) -> str:
    distance, own = of_model["distance"], of_model["own"]
    text = "equals the base model" if distance is None else f"restored, it differs by {distance:.2g} x its change"
    return text + (f"; {_count(len(own), 'tensor')} of its own kept" if own else "")


def _restore(emr: dict[str, Any], out_path: str) -> str:
    """How to get a model back."""
    name, *others = restore_names(emr).values()
    text = restore_command(out_path, name)
    if not others:
        return text
    return f"{text}; likewise {', '.join(others) if len(others) <= 3 else f'{len(others)} others'}"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"


def _regmean(report: dict[str, Any]) -> Iterable[str]:
    if "regmean" not in report:
        return
    regmean = report["regmean"]
    text = f"{len(regmean['closed_form'])} of {report['tensors']} tensors in closed form"
    if (of_weights := share(regmean)) is not None:
        text += f" ({100 * of_weights:.0f} % of the weights)"
    if alignments := mean_alignments(regmean["closed_form"]):
        names = short_models(alignments)
        means = {names[model]: mean for model, mean in alignments.items()}
        text += f", alignment with {_each(means, lambda mean: f'{mean:.2f}')}"
    if reasons := reasons_in_a_line(regmean["as_task_arithmetic"]):
        text += f"; as task_arithmetic does: {reasons}"
    yield text


def _vocabulary(report: dict[str, Any]) -> Iterable[str]:
    if "vocabulary" not in report:
        return
    vocabulary = report["vocabulary"]
    parts = [f"{row['shown']} of {row['rows']} rows of {row['tensor']} by {MERGED_BY[row['by']]}" for row in vocabulary["merged"]]
    if reasons := reasons_in_a_line(vocabulary["left"]):
        parts.append(f"left to the merge method: {reasons}")
    if parts:
        yield "; ".join(parts)


def _refined(report: dict[str, Any]) -> Iterable[str]:
    if "refined" not in report:
        return
    refined = report["refined"]
    text = f"{len(refined['layers'])} of {report['tensors']} tensors"
    if errors := mean_errors(refined):
        before, after = (f"{error:.{told_apart(*errors)}g}" for error in errors)
        text += f", whose outputs now differ from the models' by {after}, before by {before} (relative, mean)"
    if reasons := reasons_in_a_line(refined["left"]):
        text += f"; as merged: {reasons}"
    yield text


def _left(report: dict[str, Any]) -> Iterable[str]:
    """What could have been purified and was not, by reason, over all models."""
    found: dict[str, dict[str, list[str]]] = {reason: defaultdict(list) for reason in _LEFT}
    for model, source in report["models"].items():
        for tensor, reason in source["left_as_they_are"].items():
            for beginning in _LEFT:
                if reason.startswith(beginning):
                    found[beginning][model].append(tensor)
    names, parts = short_models(report["models"]), []
    for reason, words in _LEFT.items():
        tensors = [tensor for of_model in found[reason].values() for tensor in of_model]
        if tensors:
            models = [names[model] for model in found[reason]]
            who = models[0] if len(models) == 1 else f"{len(models)} models"
            kinds = list(dict.fromkeys(re.sub(r"\[\d+\]$", "[*]", kind(tensor)) for tensor in tensors))
            more = f" and {len(kinds) - _NAMED} kinds more" if len(kinds) > _NAMED else ""
            parts.append(f"{len(tensors)} weights of {who}, {words}: {', '.join(kinds[:_NAMED])}{more}")
    if parts:
        yield "; ".join(parts)


def _each(numbers: dict[str, float], written: Callable[[float], str]) -> str:
    """Models and their numbers if there are few, else the range."""
    if len(numbers) > 3:
        return f"{len(numbers)} models {_range(numbers, written)}"
    return ", ".join(f"{name} {written(number)}" for name, number in numbers.items())


def _range(numbers: dict[str, float], written: Callable[[float], str]) -> str:
    """The smallest and the largest number, with the models that have them."""
    least, most = min(numbers, key=numbers.get), max(numbers, key=numbers.get)
    if written(numbers[least]) == written(numbers[most]):
        return written(numbers[least])
    return f"{written(numbers[least])} ({least}) to {written(numbers[most])} ({most})"
