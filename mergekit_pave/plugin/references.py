"""How mergekit writes a model's name into YAML and JSON."""

from __future__ import annotations

from mergekit.common import ModelReference


def make_writable() -> None:
    """Let a reference with a space or a quote in it be written like any other. Idempotent.

    mergekit gives such a reference back as it is, which pydantic refuses as circular. What gives it is part of the schema of
    every class with a reference in it, all of them built already; so it gets another body, which all of them run.
    """
    try:
        ModelReference(model="a b").model_dump_json()
    except ValueError:
        ModelReference.serialize.__code__ = _serialize.__code__


def _serialize(self):  # nothing from outside: it runs among mergekit's names
    if self.override_architecture is not None:
        return {"model": self.model, "lora": self.lora, "override_architecture": self.override_architecture}
    return str(self)
