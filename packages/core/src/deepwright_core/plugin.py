"""deepwright_core as a plugin: what it registers."""
