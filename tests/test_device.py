"""The pretend accelerator of tests/pretend_device.py: runs what is to be run on it, in a process of its own."""

from pathlib import Path

import pytest
import torch
from commands import fresh

HERE = Path(__file__).parent
# Beside tests/on_device, tests that hold for any device. Most of them compare with an independent reference.
TOO = (
    "test_end_to_end.py::test_forms_of_data[gpt2-column]",
    "test_end_to_end.py::test_forms_of_data[bert-pair]",
    "test_experts.py::test_every_expert_is_exact[gpt_oss-7]",
    "test_vision_language.py::test_texts_purify_the_text_decoder_alone[qwen2_5_vl]",
    "test_readme.py::test_commands",
    "test_score.py::test_language_models_are_scored_by_definition[gemma2-ForCausalLM]",
    "test_score.py::test_weights_that_cannot_be_read_in_parts_are_loaded_whole[expert]",
)

needs_python_backends = pytest.mark.skipif(
    not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this PyTorch has no backends in Python",
)


@needs_python_backends
def test_on_the_device():
    tests = [HERE / "on_device", *(HERE / name for name in TOO)]
    process = fresh("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, PRETEND_DEVICE="1")
    told, _ = process.communicate(timeout=900)
    assert process.returncode == 0, told[-20000:]
