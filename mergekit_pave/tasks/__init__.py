"""The graph tasks that join calibration, decomposition and allocation to a merge.

Two phases come before the merge and fill the caches with what they lack: `CalibrateModel` for each model, then for each
weight

    LoadTensor --> DecomposeWeight

The merge only reads. For each output tensor and each model that is purified in it:

    LoadTail ----+--> AllocateRanks --> PurifyTensor --> GatherPurified --> mergekit's merge
                 |    (all models)          ^   |
    LoadTensor --|--------------------------+   +--> PurificationStats --> WriteReport

A merge by `regmean` has its own task in the place of mergekit's. It reads the covariances, too, and `WriteReport` asks it what
it did:

    GatherTensors (or GatherPurified) --> MergeByRegMean

mergekit's executor runs these tasks like its own: it streams, moves tensors to the accelerator and frees them. Values that
travel between tasks are therefore plain dicts of tensors and numbers. A covariance is no such value: it is read where it is
used, so that only one at a time is in memory, however many models there are.
"""
