"""Questions and pictures as tensors, and what every position of the sequence is.

A question, pictures and a processor become ``Inputs``: tensors, and a ``TokenLayout`` for each row. ``prompts`` builds
them, ``layout`` answers where things are, ``families`` knows how each architecture cuts pictures. Nothing here depends
on models or experiments.
"""

from mech.inputs.batch import Inputs, collate
from mech.inputs.canvas import Canvas
from mech.inputs.families.family import FAMILIES, Family, Geometry, geometry_of
from mech.inputs.layout import IMAGE, PADDING, TEXT, VIDEO, TokenLayout
from mech.inputs.processor import Processor, load_processor
from mech.inputs.prompts import build, encode

__all__ = [
    "FAMILIES",
    "IMAGE",
    "PADDING",
    "TEXT",
    "VIDEO",
    "Canvas",
    "Family",
    "Geometry",
    "Inputs",
    "Processor",
    "TokenLayout",
    "build",
    "collate",
    "encode",
    "geometry_of",
    "load_processor",
]
