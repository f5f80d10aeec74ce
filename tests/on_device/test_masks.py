"""Long samples, whose attention masks are packed in main memory and made anew on the device."""

import pytest
import torch
from pretend_device import NAME
from test_calibration import measurements
from test_calibration_memory import CONFIGS, job_for, lengths

from mergekit_pave.calibration.job import Runtime
from mergekit_pave.calibration.run import measure_in_lockstep


@pytest.mark.parametrize("cls", CONFIGS)
def test_masks_are_those_of_the_cpu(tmp_path, cls):
    job = job_for(cls, tmp_path / "model", lengths(6, 150, 300), batch_size=3)

    def measured(device: str) -> dict[str, torch.Tensor]:
        found = measurements(measure_in_lockstep(job, Runtime(device, False, True), job.batch_size))
        return {layer: covariance.to(torch.device("cpu")).matrix() for members, covariance in found for layer in members}

    there, here = measured(NAME), measured("cpu")
    assert there.keys() == here.keys() and there
    for layer, matrix in there.items():
        assert (matrix - here[layer]).norm() <= 1e-5 * here[layer].norm(), layer
