"""A suite of workloads: the default method with nothing set, beside peers that were tuned with equal budgets.

`python -m benchmarks.workloads suite` does what is missing, `… table` writes what was found. `problems` has what is
learnt, `optimizers` who learns it, `running` one run, `tuning` which runs there are, `tables` and `profiles` what they
say.
"""
