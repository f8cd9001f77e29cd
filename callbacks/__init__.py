"""Lightning callbacks, one per file."""

from callbacks.fid import FrechetDistance
from callbacks.image_writer import ImageWriter
from callbacks.likelihood import BitsPerDim
from callbacks.sample_grid import SampleGrid
from callbacks.students import Students
from callbacks.throughput import Throughput

__all__ = ["BitsPerDim", "FrechetDistance", "ImageWriter", "SampleGrid", "Students", "Throughput"]
