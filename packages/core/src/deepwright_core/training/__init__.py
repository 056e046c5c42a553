"""Training: objective, optimizers, schedule, checkpoints, and the one loop that every stage uses."""
