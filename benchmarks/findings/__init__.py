"""The findings of RADIOv2.5 and PHI-S measured at pocket scale; `python -m benchmarks.findings`.

`declare` says what a finding is, and a module each declares one: claim, arms, measure, comparisons.
`trained` makes an arm's run of `material`, by `shared_stream`; `measures` and the finding's own
measure it; `records` keeps that as JSON; `compare` turns records into intervals and verdicts;
`report` and `figures` make the page.
"""
