"""The stages that core itself provides."""
