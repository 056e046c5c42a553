"""Multi-head latent attention for deepwright, with absorbed decode over the latent cache."""
