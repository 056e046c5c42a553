"""Models, data, training, checkpoints and the generation engine of deepwright."""
