"""The findings of RADIOv2.5 and PHI-S measured at pocket scale; `python -m benchmarks.findings`."""
