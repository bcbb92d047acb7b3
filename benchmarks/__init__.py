"""What the package is measured by; not part of the wheel.

A study (`workloads`, `batches`) has many runs, each a process of its own that leaves a record: `store` keeps them,
`suite` does those that are missing, `grid` has the rates of tuning, `commands` what their command lines share,
`figures` what their pages do.
"""
