"""Gradients to stored matrices and back: numpy only, no disk, no torch."""

from timstore.encoding.encode import Encoded, Matrix, encode
from timstore.encoding.precision import PRECISIONS, restore
from timstore.encoding.products import densify

__all__ = ["PRECISIONS", "Encoded", "Matrix", "densify", "encode", "restore"]
