"""The machinery of a training: what you look up, not what you edit."""
