"""Every architecture of the table: a real merge, tensor by tensor against the float64 reference, and loaded again."""

import pytest
import transformers
from architectures import ARCHITECTURES, TABLE, make_architecture, with_table
from merging import assert_exact, config_for, merge
from models import saved_anew
from reference import purify, weights


@pytest.fixture(params=ARCHITECTURES)
def family(request, tmp_path):
    return make_architecture(request.param, tmp_path)


def test_architecture(family, tmp_path):
    architecture = ARCHITECTURES[family.kind]
    column = "image" if architecture.tokenizer == "image" else "text"
    models = [{"model": str(m), "data": {"path": str(d), column: column}} for m, d in zip(family.tuned, family.data)]
    pave = {"models": models, "regularization": 0.1}
    sources = [(data, column, column) for data in family.data]
    expected = purify(family.kind, family.base, family.tuned, sources, lambda place, tensor: 0.875, regularization=0.1)
    for i, weight in enumerate([(1.0, 0.0), (0.0, 1.0)]):
        # mergekit alone leaves some tensors of some models out, or renames them, but this is what it would write.
        plain = {name: tensor.double() for name, tensor in weights(family.tuned[i]).items()}
        if architecture.refused:
            with pytest.raises((TypeError, RuntimeError)):
                merge(config_for(family, weight=weight, dtype="float64"), tmp_path / f"plain{i}")
        else:
            alone = merge(config_for(family, weight=weight, dtype="float64"), tmp_path / f"plain{i}")
            plain |= {name: tensor for name, tensor in alone.items() if name in plain}
        out = tmp_path / f"purified{i}"
        written = merge(config_for(family, pave, weight=weight, dtype="float64"), out)
        assert (written.keys() == weights(family.base).keys()) is not architecture.converted
        if architecture.converted:
            written = weights(saved_anew(architecture.kind.model, out, tmp_path / f"stored{i}"))
        assert_exact(written, expected[i], plain)
    _, info = getattr(transformers, architecture.kind.model).from_pretrained(out, output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys")), info


def test_the_table_tells_what_is_tested():
    assert TABLE.read_text() == with_table(TABLE.read_text()), "run `python tests/architectures.py`"
