"""deepwright_mla as a plugin: what it registers."""
