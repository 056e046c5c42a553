"""deepwright_serve as a plugin: what it registers."""
