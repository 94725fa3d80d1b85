"""The older layout of JSON and pickle files, in and out, and the function that wrote it."""

from timstore.legacy.exporting import Exported, export_trajectories
from timstore.legacy.importing import Imported, import_trajectories
from timstore.legacy.trajectory import save_gradient_trajectory

__all__ = ["Exported", "Imported", "export_trajectories", "import_trajectories", "save_gradient_trajectory"]
