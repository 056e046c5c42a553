"""deepwright_moe as a plugin: what it registers."""
