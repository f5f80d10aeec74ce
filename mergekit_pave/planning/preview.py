"""What a merge with a `pave:` block would do and cost, for people and as JSON."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch

from mergekit_pave.calibration.generation import Generation
from mergekit_pave.calibration.models import inference_dtype
from mergekit_pave.core.exact import float64_device
from mergekit_pave.core.linear import Linear
from mergekit_pave.emr.file import FOLDER
from mergekit_pave.files import readable
from mergekit_pave.planning.emr import PlannedEmr
from mergekit_pave.planning.plan import Plan
from mergekit_pave.planning.scoring import FEWEST
from mergekit_pave.planning.speed import reading_speed, speed
from mergekit_pave.report.summary import by_model, kind, reasons_in_a_line, vocabulary_lines, warnings
from mergekit_pave.report.tables import written
from mergekit_pave.tasks.calibrate import CalibrateModel


def preview(plan: Plan, device: str, samples: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Per model what will be purified, what not and why, what is cached, and what is still to be done.

    Args:
        samples: rows of the report for a few weights of each model; see `sample_removal`.

    Seconds are operations over the speed of this machine, measured on the spot.
    """
    exact = speed(torch.float64, float64_device(torch.device(device)))
    to_do = {task.job.name: task for task in plan.to_calibrate}
    cached = {task.model for task in plan.calibrations if task.is_done}
    models = {}
    for model, source in plan.header["models"].items():
        weights = [weight for weight in plan.weights if str(weight.model) == model]
        missing = [task for task in plan.decompositions if str(task.model) == model]
        cost = to_do[model].estimate() if model in to_do else None
        models[model] = {
            "data": source["data"],
            "samples": source["samples"],
            "tokens": source["tokens"],
            "rows_left": plan.left[model],
            "purified": [
                {
                    "tensor": weight.tensor,
                    "output": weight.output,
                    "shape": list(weight.layer.stored_shape),
                    "components": min(weight.layer.shape),
                    "drop": weight.drop,
                    "cached": weight.cached,
                }
                for weight in weights
            ],
            "left_as_they_are": source["left_as_they_are"],
            "covariances": _state(to_do.get(model), model in cached),
            **({"generation": _generation(plan.to_write[model], source, device)} if model in plan.to_write else {}),
            "calibration": cost
            and {
                "seconds": cost.operations / speed(inference_dtype(to_do[model].job.config, device), device),
                "memory": cost.peak,
                "cache": cost.cache,
            },
            "decomposition": {
                "weights": len(missing),
                "seconds": sum(_operations(task.layer, source["tokens"]) for task in missing) / exact,
                "cache": sum(task.cache for task in missing),
            },
            "removed": _removed(samples.get(model, [])),
        }
    refined = _refined(plan, device, exact) if plan.refinement else None
    of_samples = warnings({"models": {}, "purified": [row for rows in samples.values() for row in rows]})
    regmean, vocabulary = plan.header.get("regmean"), plan.header.get("vocabulary")
    if vocabulary and plan.to_write:  # which tokens there will be is not known
        unknown = {"shown", "tokens"}
        merged = [{key: value for key, value in row.items() if key not in unknown} for row in vocabulary["merged"]]
        vocabulary = vocabulary | {"merged": merged}
    return {
        "tensors": plan.header["tensors"],
        "device": device,
        "compared": plan.compared,
        "models": models,
        **({"regmean": {"closed_form": len(plan.closed_forms)} | regmean} if regmean else {}),
        **({"vocabulary": vocabulary} if vocabulary else {}),
        **({"refined": refined} if refined else {}),
        **({"emr": _emr(plan.emr)} if plan.emr else {}),
        "warnings": plan.warnings + of_samples,
    }


def _state(to_do: CalibrateModel | None, is_cached: bool) -> str:
    """Of the covariances of a model."""
    if to_do is None:
        return "there already" if is_cached else "not needed"
    return "to do again, as they were not kept" if to_do.is_again else "to do"


def _generation(generation: Generation, source: dict[str, Any], device: str) -> dict[str, Any]:
    """What it takes until a model has written its samples: for each token of a batch every weight is read."""
    steps = len(generation.missing(0, source["samples"])) * generation.longest
    dtype = inference_dtype(generation.config, device)
    return {
        "texts": source["samples"],
        "max_length": generation.longest,
        "steps": steps,
        "seconds": steps * generation.num_weights / reading_speed(dtype, device, generation.batch_size),
        "memory": generation.memory,
    }


def _emr(emr: PlannedEmr) -> dict[str, Any]:
    """The files that models are restored with."""
    return {
        "base_only": emr.base_only,
        "models": {
            str(file.model): {"file": f"{FOLDER}/{file.name}.safetensors", "bytes": file.size, "own": list(file.own)}
            for file in emr.files
        },
    }


def _refined(plan: Plan, device: str, exact: float) -> dict[str, Any]:
    """What refining would fit, and what it would cost.

    Args:
        exact: operations a second in float64.
    """
    refinement, cost = plan.refinement, plan.refinement.estimate()
    passes = cost.passes / speed(inference_dtype(refinement.config, device), device)
    return {
        "settings": plan.header["refined"]["settings"],
        "layers": [layer.name for layer in refinement.layers.values()],
        "left": plan.header["refined"]["left"],
        "seconds": passes + cost.sums / speed(torch.float32, device) + cost.fits / exact,
        "memory": cost.peak,
        "disk": refinement.size,
    }


def _removed(rows: list[dict[str, Any]]) -> dict[str, float] | None:
    """How large the removed part of some weights is beside what fine-tuning changed in them."""
    for sums in by_model({"purified": rows}).values():
        if sums["change_norm"]:
            weights = len({row["tensor"] for row in rows})
            return {"share_of_change": sums["removed_over_change"], "weights": weights}
    return None


def _operations(layer: Linear, tokens: int) -> float:
    """What the decomposition of a weight costs: W C, its factorisation, and the steps that find the tail."""
    d_out, d_in = layer.shape
    n = min(layer.shape)
    tall = 2 * d_out * d_in**2 if d_out > d_in else 0
    return len(layer.layers) * (tall + 2 * n * d_in * min(d_in, 2 * tokens) + 3 * n * n * d_in)


def as_text(preview: dict[str, Any]) -> str:
    """The preview for people."""
    outputs = {row["output"] for model in preview["models"].values() for row in model["purified"]}
    lines = [_in_short(preview, len(outputs))]
    if outputs and not preview["compared"]:
        lines[0] += " Weights that equal the base model's are left as they are; the merge finds out which ones do."
    if "regmean" in preview:
        others = reasons_in_a_line(preview["regmean"]["as_task_arithmetic"]) or "none"
        lines.append(f"Merged as task_arithmetic does: {others}.")
    if "vocabulary" in preview:
        lines += [f"{line}." for line in vocabulary_lines(preview["vocabulary"])]
    if refined := preview.get("refined"):
        lines.append(
            f"Refining takes about {_duration(refined['seconds'])} on {preview['device']}, "
            f"{readable(refined['memory'])} of memory, and while the merge runs {readable(refined['disk'])} of disk; as the "
            f"merge method gives them: {reasons_in_a_line(refined['left']) or 'none'}."
        )
    if emr := preview.get("emr"):
        lines.append(f"Of the base model alone: {reasons_in_a_line(emr['base_only']) or 'none'}.")
        for name, file in emr["models"].items():
            own = f", with {len(file['own'])} tensors of its own (such as {file['own'][0]})" if file["own"] else ""
            lines.append(f"{file['file']}, about {readable(file['bytes'])}, will restore {name}{own}.")
    for name, model in preview["models"].items():
        data, counted = ", ".join(map(_data_name, model["data"])) or "not needed", ""
        if cost := model.get("generation"):
            data, counted = data.replace("written", "to be written"), "at most "
        lines += ["", name, f"  data           {data}: {model['samples']} samples, {counted}{model['tokens']} tokens count"]
        if cost:
            lines.append(
                f"  generation     to do: at most {cost['steps']} steps for texts of up to {cost['max_length']} tokens, about "
                f"{_duration(cost['seconds'])} on {preview['device']}, {readable(cost['memory'])} of memory (the whole model)"
            )
        cost = model["calibration"]
        calibration = model["covariances"]
        if cost:
            calibration = (
                f"{calibration}: about {_duration(cost['seconds'])} on {preview['device']}, "
                f"{readable(cost['memory'])} of memory, {readable(cost['cache'])} of cache"
            )
        lines.append(f"  calibration    {calibration}")
        missing = model["decomposition"]["weights"]
        total = len({row["tensor"] for row in model["purified"]})
        decomposition = f"{total - missing} of {total} weights in the cache"
        if missing:
            cost = model["decomposition"]
            decomposition += f", {missing} to do: about {_duration(cost['seconds'])}, at most {readable(cost['cache'])} of cache"
        if model["purified"]:
            lines.append(f"  decomposition  {decomposition}")
        if removed := model["removed"]:
            ratio, weights = f"{removed['share_of_change']:.2g}", removed["weights"]
            lines.append(f"  removed part   about {ratio} x what fine-tuning changed, by {weights} weights, one of each kind")
        if model["purified"]:
            lines += ["  to be purified (components dropped before allocation moves them between models)"]
            lines += [f"    {line}" for line in _grouped(model["purified"])]
        if model["left_as_they_are"]:
            lines.append("  to be merged as they are")
        reasons = defaultdict(list)
        for tensor, reason in model["left_as_they_are"].items():
            reasons[reason].append(tensor)
        for reason, tensors in reasons.items():
            patterns = list(dict.fromkeys(map(kind, tensors)))
            more = f" and {len(patterns) - 3} more kinds" if len(patterns) > 3 else ""
            lines.append(f"    {len(tensors):5} {reason}: {', '.join(patterns[:3])}{more}")
    lines += [f"\nWarning: {warning}." for warning in preview["warnings"]]
    few = {name: left for name, model in preview["models"].items() if (left := model["rows_left"]) is not None and left < FEWEST}
    lines += [
        f"\nHint: the data of {name} has {left or 'no'} rows beside its calibration samples, and `mergekit-pave score` needs "
        f"{FEWEST} that the merge has not seen. To score it, add rows, or set calibration.samples lower."
        for name, left in few.items()
    ]
    return "\n".join(lines)


def _in_short(preview: dict[str, Any], purified: int) -> str:
    """What will be done to how many tensors, in a sentence."""
    closed, refined = preview.get("regmean", {}).get("closed_form", 0), len(preview.get("refined", {}).get("layers", ()))
    shared = preview["tensors"] - len(preview["emr"]["base_only"]) if "emr" in preview else 0
    counts = {"purified": purified, "merged by regmean in closed form": closed, "refined": refined, "shared by emr": shared}
    first, *others = [(count, what) for what, count in counts.items() if count] or [(0, "purified")]
    more = "".join(f", {count} {what}" for count, what in others)
    return f"{first[0]} of {preview['tensors']} tensors will be {first[1]}{more}."


def _data_name(data: dict[str, Any]) -> str:
    if "generated" in data:
        return written(data)
    return " / ".join(filter(None, (data["path"], data.get("name"), data["split"])))


def _grouped(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each kind of tensor: those whose names differ in numbers only."""
    kinds: dict[tuple[str, tuple[int, ...]], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        kinds[kind(row["tensor"]), tuple(row["shape"])].append(row)
    width = max((len(pattern) for pattern, _ in kinds), default=0)
    lines = []
    for (pattern, shape), alike in kinds.items():
        drops = sorted({row["drop"] for row in alike})
        dropped = f"{drops[0]}" if len(drops) == 1 else f"{drops[0]} to {drops[-1]}"
        shown_shape = " x ".join(map(str, shape))
        lines.append(f"{len(alike):5} {pattern:{width}}  {shown_shape:>14}  {dropped} of {alike[0]['components']}")
    return lines


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
