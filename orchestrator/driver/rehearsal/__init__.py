"""A recipe tried for a few steps a stage in a scratch folder, killed once and gone on with, beside what `plan` says."""
