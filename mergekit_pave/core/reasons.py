"""Why a weight of a linear layer stays as it is; in the report, the card and the log."""

FEW_TOKENS = "an expert that saw too few calibration tokens"
NEVER_CALLED = "never called during calibration"
UNCHANGED = "equal to the base model's"
