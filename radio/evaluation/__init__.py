"""Measure a target by a task."""
