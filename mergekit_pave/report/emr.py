"""What `merge_method: emr` keeps of each model: names, tables and warnings, as the model card, the page and the log show them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from mergekit_pave.files import readable
from mergekit_pave.report.places import short_models

PAPER = "https://arxiv.org/abs/2405.17461"

# With τᵢ = Wᵢ - W_base.
FORMULAS = {
    "γ = sign Σ τᵢ": "the direction in which the models go together, entry by entry",
    "τ = γ max {|τᵢ| : τᵢ γ > 0}": "the change that all models share",
    "Mᵢ = [τᵢ γ > 0]": "the mask of model i: where it goes that way",
    "λᵢ = Σ |τᵢ| / Σ |Mᵢ τ|": "its scale, one number over all entries",
    "Wᵢ ≈ W_base + λᵢ Mᵢ τ": "the model as it is restored",
}
_NAMED = 3  # tensors that a cell names
_LARGE = 2.0  # a scale above it is warned of


def restore_names(emr: dict[str, Any]) -> dict[str, str]:
    """For each model the NAME by which `mergekit-pave restore` knows it."""
    return {model: PurePosixPath(of_model["file"]).stem for model, of_model in emr["models"].items()}


def restore_command(out_path: str, name: str) -> str:
    """What to type to restore one model. `./NAME` may be the model that was merged."""
    return shlex.join(["mergekit-pave", "restore", out_path, name, "-o", f"./{name}-again"])


def size(emr: dict[str, Any]) -> str:
    """Of all files together, for people."""
    return readable(sum(of_model["bytes"] for of_model in emr["models"].values()))


def restored_table(emr: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple]]:
    """What is kept of each model, and how close to it the restored one is."""
    names = short_models(emr["models"])
    head = ("model", "file", "size", "scale (λᵢ)", "share of entries", "distance", "own tensors")
    return head, [
        (
            names[model],
            of_model["file"],
            readable(of_model["bytes"]),
            f"{of_model['scale']:.3g}",
            f"{100 * of_model['agreed']:.1f} %",
            "-" if of_model["distance"] is None else f"{of_model['distance']:.3g}",
            _some(of_model["own"]),
        )
        for model, of_model in emr["models"].items()
    ]


def meaning(report: dict[str, Any]) -> str:
    """What the columns of the table say."""
    before = ", with Wᵢ as it was before it was purified" if report["purified"] else ""
    text = (
        "Share of entries: where the mask is set. Distance: ‖restored - Wᵢ‖ / ‖Wᵢ - W_base‖ over the shared tensors"
        f"{before}; 0 is the model itself, 1 as far from it as the base model."
    )
    if any(of_model["own"] for of_model in report["emr"]["models"].values()):
        text += " Own tensors, such as heads, are kept whole."
    return text


def _some(tensors: Sequence[str]) -> str:
    if not tensors:
        return "-"
    more = f" and {len(tensors) - _NAMED} more" if len(tensors) > _NAMED else ""
    return ", ".join(tensors[:_NAMED]) + more


def emr_warnings(report: dict[str, Any]) -> list[str]:
    """What a user should look at: models that are restored badly."""
    purified, messages = {row["model"] for row in report["purified"]}, []
    for model, of_model in report["emr"]["models"].items():
        distance, scale = of_model["distance"], of_model["scale"]
        if distance is not None and distance >= 1:
            times = "" if f"{distance:.3g}" == "1" else f"{distance:.3g} times "
            why, closer = "so little of its change is left", "models whose changes are of like size"
            if model in purified:
                why, closer = "also by what purification removed", "a larger rank_ratio"
            messages.append(
                f"{model}: restored, it is {times}as far from the model as the base model is, {why}. Look at its quality before "
                f"it is used; fewer models, or {closer}, bring it closer"
            )
        if scale > _LARGE:
            messages.append(
                f"{model}: its scale is {scale:.3g}, so at most {100 / scale:.0f} % of its change, by size, is left where its "
                "mask is set. The other models go the other way, or the precision of the merge cannot tell its change from the "
                "base model. Look at its quality before it is used; fewer models or a wider dtype leave more"
            )
    return messages
