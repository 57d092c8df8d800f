"""Parts of bundle configs, and new bundles for your own data."""
