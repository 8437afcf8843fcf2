def cleanup_dist_env_and_memory():
    """There is nothing to clean."""
