"""deepwright_rl as a plugin: what it registers."""
