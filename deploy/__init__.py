"""From a checkpoint to a verified run directory, and everything around the device."""
