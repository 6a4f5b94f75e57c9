"""Hot paths of af-dcd."""
