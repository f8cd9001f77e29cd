"""Shapes and schedules for tests of noise."""

SHAPE = (3, 4, 4)
