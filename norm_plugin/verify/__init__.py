"""Stock against patched: the engine runs twice as it is and once with the plugin, and its answers are compared."""
