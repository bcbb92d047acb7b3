"""Larger batches: steps to a fixed training loss, the default with nothing set beside peers tuned at each batch.

`python -m benchmarks.batches suite` does what is missing, `… table` writes what was found. `study` has the workloads,
the targets and which runs there are, `running` one run, `tables` and `figure` what the records say.
"""
