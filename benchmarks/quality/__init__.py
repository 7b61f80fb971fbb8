"""Teachers and student by the same tasks, as JSON and as docs/results.md.

    python -m benchmarks.quality [--data DIR] [--out DIR] [--teachers pocket] [--student pocket]
                                 [--control TARGET] [--curve RUN] [--page FILE] [--page-only]
                                 [SUBJECT ...]

A subject is what a column of the page is about: `pixels`, `constant`, each teacher, `student`,
`control` (the student of teachers with random weights, if one is given), `step-...` (checkpoints of
--curve). What is measured already, of the same weights, pictures and settings, is not measured
again, so a run that was stopped goes on.

`jobs` says what is measured of whom, `measure` does it, `store` keeps it; `compare` sets results
side by side, `verdicts` says what they must show, and `page` writes all of it.
"""
