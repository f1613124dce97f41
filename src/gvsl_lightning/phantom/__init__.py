"""Generated 3D anatomy with labels: data that needs no download (NumPy, no Lightning)."""

from gvsl_lightning.phantom.scenes import SCENES, Scene, body_coordinates, generate_phantom

__all__ = ["SCENES", "Scene", "body_coordinates", "generate_phantom"]
