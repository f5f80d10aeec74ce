"""How mergekit writes a model's name into YAML and JSON."""

from __future__ import annotations

from mergekit.common import ModelReference


def make_writable() -> None:
    """Let a reference with a space or a quote in it be written like any other. Idempotent.

    mergekit's serializer returns such a reference as it is, which pydantic refuses as circular. The serializer is part of the
    schemas of all classes with a reference in them, and these are built already. So the function gets another body.
    """
    try:
        ModelReference(model="a b").model_dump_json()
    except ValueError:
        ModelReference.serialize.__code__ = _serialize.__code__


def _serialize(self):  # it may use no name of this module: it runs in mergekit's
    if self.override_architecture is not None:
        return {"model": self.model, "lora": self.lora, "override_architecture": self.override_architecture}
    return str(self)
